"""Asks a vision-language model what a picture is worth, behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted
one, or `imagerl serve` with a model of ours)."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from imagerl.rewards.boundary.client import Client, GaveUp, Refused, secret
from imagerl.rewards.completions import AnswerCache, Said, picture_part, read_completion, text_part
from imagerl.rewards.judge.rubrics import load_rubric
from imagerl.rewards.ocr.reward import normalise, quoted_text
from imagerl.rl.types import ImageRLError, RewardOutput

MENDED_BY_USER = (401, 403, 404)
REMEMBERED = 20_000  # answers
ADDRESS = re.compile(r"https?://[\w.\-\[\]:]+(?:/[\w.\-~]+)*/?")


@dataclass(slots=True)
class _Verdict:
    value: float | None = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


class JudgeReward:
    """The mark of a judge under a rubric, in [0, 1]; its single marks are parts, and so are `time_s`, `tokens_in`,
    `tokens_out`, `cost`, `cached` and `retries` of the question.

    `endpoint` is the address before `/chat/completions`, mostly ending in /v1. `key_env` names the environment
    variable with the key; without it none is sent. At most `concurrency` questions are under way at a time, each
    attempt has `timeout_s` seconds, and all of one call `patience_s`. `price` is {input, output} per million tokens.
    Answers are remembered by the whole question (picture, prompt, rubric, model), in `cache` too if that names a
    folder. `structured` asks for the rubric's JSON schema; every answer is checked against it anyway.

    A sample whose question does not apply, because a column that the rubric names is None, is None. One that the judge
    fails is NaN, with the reason. Raises ImageRLError when the endpoint cannot be reached at the start, does not accept
    the key, or does not know the model."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        rubric: str = "alignment",
        key_env: str | None = None,
        concurrency: int = 8,
        max_tokens: int = 512,
        temperature: float | None = 0.0,
        structured: bool = True,
        price: Mapping[str, float] | None = None,
        cache: str | None = None,
        timeout_s: float = 40.0,
        patience_s: float = 48.0,
    ) -> None:
        if not ADDRESS.fullmatch(endpoint):
            raise ImageRLError(
                "the endpoint of reward 'judge' must be http(s)://host:port/v1, without user, password and query: "
                "the key comes from the environment variable that key_env names"
            )
        if min(concurrency, max_tokens) < 1 or min(timeout_s, patience_s) <= 0:
            raise ImageRLError(
                "concurrency, max_tokens, timeout_s and patience_s of a judge must be positive"
            )
        self.rubric = load_rubric(rubric)
        self._model = model
        self._price = _price(price)
        self._asking: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
        if temperature is not None:
            self._asking["temperature"] = temperature
        if structured and self.rubric.questions:
            schema = {"name": "marks", "strict": True, "schema": self.rubric.schema}
            self._asking["response_format"] = {"type": "json_schema", "json_schema": schema}
        self._concurrency, self._timeout_s, self._patience_s = concurrency, timeout_s, patience_s
        self._answers = AnswerCache(REMEMBERED, None if cache is None else Path(cache))
        key = None if key_env is None else secret(key_env, f"the key of {endpoint}")
        base = endpoint.rstrip("/")
        self._client = Client(base, key)
        self._check(base)

    def _check(self, base: str) -> None:
        """Check that the server answers and accepts the key. Nothing else that `/models` says matters."""
        deadline = time.monotonic() + self._patience_s
        try:
            self._client.send("GET", None, deadline, self._timeout_s, path="/models")
        except GaveUp as error:
            raise ImageRLError(f"the judge at {base} cannot be reached: {error}") from error
        except Refused as error:
            if error.status in (401, 403):
                raise ImageRLError(f"the judge at {base} refuses the key: {error}; see key_env") from error

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: list[Any]) -> RewardOutput:
        deadline = time.monotonic() + self._patience_s
        sources = self._sources(len(prompts), columns)
        verdicts = [_Verdict(None) for _ in prompts]  # not applicable, until asked
        questions: dict[bytes, list[int]] = {}  # what several samples ask alike is asked once
        expected: dict[int, str | None] = {}
        for row, prompt in enumerate(prompts):
            values = self._values(prompt, {name: column[row] for name, column in columns.items()})
            if values is None or (self.rubric.source and sources[row] is None):
                continue
            if self.rubric.expect is not None:
                expected[row] = self.rubric.expect.format_map(values)
                if not normalise(expected[row] or ""):
                    continue
            question = self._question(values, images[row], sources[row])
            questions.setdefault(question, []).append(row)
        with ThreadPoolExecutor(self._concurrency) as threads:
            asked = [threads.submit(self._ask, question, deadline) for question in questions]
            try:
                answers = [answer.result() for answer in asked]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        for (question, rows), said in zip(questions.items(), answers, strict=True):
            for row in rows:
                verdicts[row] = self._verdict(said, expected.get(row), first=row == rows[0])
            if isinstance(said, Said) and not said.cached and verdicts[rows[0]].reason is None:
                self._answers.put(question, said.text)
        return _output(verdicts)

    def _sources(self, size: int, columns: Mapping[str, list[Any]]) -> list[Any]:
        if not self.rubric.source:
            return [None] * size
        if "reference" not in columns:
            raise ImageRLError(
                f"rubric {self.rubric.name!r} of reward 'judge' shows the source of an edit; the prompt set needs the "
                "column reference"
            )
        return columns["reference"]

    def _values(self, prompt: str, columns: Mapping[str, Any]) -> dict[str, str] | None:
        """Return the values for the rubric's braces; None when one of its columns is None here. A missing target
        is the first quoted text of the prompt, as for `ocr`."""
        values = {"prompt": prompt}
        for name in self.rubric.fields:
            value = columns.get(name)
            if value is None and name == "target":
                value = quoted_text(prompt)
            elif name not in columns:
                raise ImageRLError(
                    f"rubric {self.rubric.name!r} of reward 'judge' names {name!r}, which is no "
                    "column of the prompt set"
                )
            if value is None:
                return None
            values[name] = str(value)
        return values

    def _question(self, values: Mapping[str, str], image: Image.Image, source: Any) -> bytes:
        if self.rubric.source:
            content = [text_part("Source:"), picture_part(source), text_part("Result:"), picture_part(image)]
        else:
            content = [picture_part(image)]
        content.append(text_part(self.rubric.show.format_map(values).strip()))
        system = self.rubric.system
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        return json.dumps({**self._asking, "messages": messages}).encode()

    def _ask(self, body: bytes, deadline: float) -> Said | str:
        """Return the answer, or why there is none. Raises ImageRLError for what must be mended."""
        known = self._answers.get(body)
        if known is not None:
            return Said(known, 0.0, 0.0, cached=True)
        started = time.monotonic()
        try:
            answer = self._client.send(
                "POST",
                body,
                deadline,
                self._timeout_s,
                {"Content-Type": "application/json"},
                "/chat/completions",
            )
            return read_completion(answer.body, time.monotonic() - started, answer.attempts - 1)
        except Refused as error:
            if error.status in MENDED_BY_USER:
                raise ImageRLError(f"the judge {self._model!r} refuses: {error}") from error
            return f"the judge refuses: {error}"
        except GaveUp as error:
            return f"the judge did not answer: {error}"
        except ValueError as error:
            return str(error)

    def _verdict(self, said: Said | str, expected: str | None, first: bool) -> _Verdict:
        """Score an answer. Among samples that share a question only the first bears its costs."""
        if isinstance(said, str):
            return _Verdict(reason=said)
        parts = {"time_s": said.time_s, "tokens_in": said.tokens_in, "tokens_out": said.tokens_out}
        if self._price is not None:
            parts["cost"] = (said.tokens_in * self._price[0] + said.tokens_out * self._price[1]) / 1e6
        if not first:
            parts = dict.fromkeys(parts, 0.0)
        parts |= {"cached": float(said.cached or not first), "retries": float(said.retries if first else 0)}
        try:
            value, marks = self.rubric.score(said.text, expected)
        except ValueError as error:
            return _Verdict(parts=parts, reason=str(error))
        return _Verdict(value, marks | parts)


def _output(verdicts: Sequence[_Verdict]) -> RewardOutput:
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    return RewardOutput(
        [verdict.value for verdict in verdicts],
        {name: [verdict.parts.get(name) for verdict in verdicts] for name in names},
        next((verdict.reason for verdict in reversed(verdicts) if verdict.reason), None),
    )


def _price(price: Mapping[str, float] | None) -> tuple[float, float] | None:
    """Return prices of a million tokens in and out. Raises ImageRLError unless there are two, neither negative."""
    if price is None:
        return None
    if set(price) != {"input", "output"} or not all(
        isinstance(value, (int, float)) and value >= 0 for value in price.values()
    ):
        raise ImageRLError("price of a judge must be {input: 0.15, output: 0.6}, per million tokens")
    return float(price["input"]), float(price["output"])
