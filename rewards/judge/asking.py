"""Ask a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one, or `imagerl serve` with
a model of ours): many questions at a time, each of them once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imagerl.rewards.boundary.client import Client, GaveUp, Refused, secret
from imagerl.rewards.completions import AnswerCache, Said, read_completion
from imagerl.rl.errors import ImageRLError

MENDED_BY_USER = (401, 403, 404)
REMEMBERED = 20_000  # answers
ADDRESS = re.compile(r"https?://[\w.\-\[\]:]+(?:/[\w.\-~]+)*/?")


class Asker:
    """Asks the model called `model` behind `endpoint`, for the reward `label`. The settings are those of `JudgeReward`;
    `schema` is one of JSON that answers must follow.

    Raises ImageRLError for settings that cannot be, and when the endpoint cannot be reached at the start, does not
    accept the key, or does not know the model."""

    def __init__(
        self,
        label: str,
        endpoint: str,
        model: str,
        key_env: str | None,
        concurrency: int,
        max_tokens: int,
        temperature: float | None,
        schema: Mapping[str, object] | None,
        price: Mapping[str, float] | None,
        cache: str | None,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        if not ADDRESS.fullmatch(endpoint):
            raise ImageRLError(
                f"the endpoint of reward {label!r} must be http(s)://host:port/v1, without user, password and query: "
                "the key comes from the environment variable that key_env names"
            )
        if min(concurrency, max_tokens) < 1 or min(timeout_s, patience_s) <= 0:
            raise ImageRLError(
                "concurrency, max_tokens, timeout_s and patience_s of a judge must be positive"
            )
        self._model = model
        self._price = _price(price)
        self._asking: dict[str, object] = {"model": model, "max_tokens": max_tokens}
        if temperature is not None:
            self._asking["temperature"] = temperature
        if schema is not None:
            named = {"name": "marks", "strict": True, "schema": schema}
            self._asking["response_format"] = {"type": "json_schema", "json_schema": named}
        self._concurrency, self._timeout_s, self._patience_s = concurrency, timeout_s, patience_s
        self._answers = AnswerCache(REMEMBERED, None if cache is None else Path(cache))
        key = None if key_env is None else secret(key_env, f"the key of {endpoint}")
        base = endpoint.rstrip("/")
        self._client = Client(base, key)
        try:  # nothing else that it says of its models matters
            self._client.send("GET", None, time.monotonic() + patience_s, timeout_s, path="/models")
        except GaveUp as error:
            raise ImageRLError(f"the judge at {base} cannot be reached: {error}") from error
        except Refused as error:
            if error.status in (401, 403):
                raise ImageRLError(f"the judge at {base} refuses the key: {error}; see key_env") from error

    def question(self, content: Sequence[Mapping[str, object]], system: str = "") -> bytes:
        """Write a question: parts of texts and pictures, after the system's instructions."""
        messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        return json.dumps({**self._asking, "messages": messages}).encode()

    def ask(self, questions: Iterable[bytes]) -> dict[bytes, Said | str]:
        """Return the answer to each question, or why there is none. Raises ImageRLError for what must be mended."""
        deadline = time.monotonic() + self._patience_s
        with ThreadPoolExecutor(self._concurrency) as threads:
            asked = {question: threads.submit(self._ask, question, deadline) for question in questions}
            try:
                return {question: answer.result() for question, answer in asked.items()}
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def remember(self, question: bytes, said: Said) -> None:
        """Keep an answer that could be used."""
        if not said.cached:
            self._answers.put(question, said.text)

    def costs(self, said: Said) -> dict[str, float]:
        """Return what an answer cost, by name; `cost` where prices are known."""
        costs = {"time_s": said.time_s, "tokens_in": said.tokens_in, "tokens_out": said.tokens_out}
        if self._price is not None:
            costs["cost"] = (said.tokens_in * self._price[0] + said.tokens_out * self._price[1]) / 1e6
        return costs | {"cached": float(said.cached), "retries": float(said.retries)}

    def _ask(self, question: bytes, deadline: float) -> Said | str:
        known = self._answers.get(question)
        if known is not None:
            return Said(known, 0.0, 0.0, cached=True)
        started = time.monotonic()
        try:
            answer = self._client.send(
                "POST",
                question,
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


def _price(price: Mapping[str, float] | None) -> tuple[float, float] | None:
    """Return prices of a million tokens in and out. Raises ImageRLError unless there are two, neither negative."""
    if price is None:
        return None
    if set(price) != {"input", "output"} or not all(
        isinstance(value, (int, float)) and value >= 0 for value in price.values()
    ):
        raise ImageRLError("price of a judge must be {input: 0.15, output: 0.6}, per million tokens")
    return float(price["input"]), float(price["output"])
