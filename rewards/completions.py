"""Handle chat completions of OpenAI-compatible endpoints: requests, answers, and a cache of both."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from imagerl.rewards.pictures import data_url
from imagerl.rl.errors import one_line


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of an endpoint, and what it cost. NaN tokens: the endpoint does not count them."""

    text: str
    tokens_in: float = math.nan
    tokens_out: float = math.nan
    time_s: float = 0.0
    retries: int = 0
    cached: bool = False


def picture_part(picture: object) -> dict[str, object]:
    """Make a PIL picture a part of a message. Raises ValueError for anything else."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def text_part(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def read_completion(body: bytes, time_s: float, retries: int) -> Said:
    """Return the answer in a chat completion. Raises ValueError with what is wrong with it."""
    try:
        told = json.loads(body)
        choice = told["choices"][0]
        message, ending = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
        usage = told.get("usage") or {}
        asked, written = (float(usage.get(name, math.nan)) for name in ("prompt_tokens", "completion_tokens"))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"the judge's answer is no chat completion ({type(error).__name__})") from error
    if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    if refusal:
        raise ValueError(f"the judge refuses: {one_line(refusal, 80)}")
    if ending == "length":
        raise ValueError("the judge's answer was cut off; raise its max_tokens")
    if not isinstance(text, str):  # an empty one may be the right answer of a judge that reads
        raise ValueError("the judge said nothing")
    return Said(text, asked, written, time_s, retries)


class AnswerCache:
    """Answers by their questions: the newest `size` in memory, all of them in a folder, if there is one.

    Safe to use from many threads and, as far as the folder goes, from many processes."""

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self._size, self._folder = size, folder
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, question: bytes) -> str | None:
        key = hashlib.sha256(question).hexdigest()
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        if self._folder is None:
            return None
        try:
            answer = (self._folder / key).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        self._remember(key, answer)
        return answer

    def put(self, question: bytes, answer: str) -> None:
        key = hashlib.sha256(question).hexdigest()
        self._remember(key, answer)
        if self._folder is not None:
            handle, name = tempfile.mkstemp(dir=self._folder, prefix="new-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(answer)
            os.replace(name, self._folder / key)  # whole or not at all, whoever else writes

    def _remember(self, key: str, answer: str) -> None:
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)
