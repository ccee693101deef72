"""Asks a vision-language model what a picture is worth, under a rubric."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from imagerl.rewards.completions import Said, picture_part, text_part
from imagerl.rewards.judge.asking import Asker
from imagerl.rewards.judge.rubrics import load_rubric
from imagerl.rewards.ocr.reward import normalise, quoted_text
from imagerl.rl.types import ImageRLError, RewardOutput


class JudgeReward:
    """The mark of a judge under a rubric, in [0, 1]; its single marks are parts, and so are `time_s`, `tokens_in`,
    `tokens_out`, `cost`, `cached` and `retries` of the question.

    `endpoint` is the address before `/chat/completions`, mostly ending in /v1. `key_env` names the environment
    variable with the key; without it none is sent. At most `concurrency` questions are under way at a time, each
    attempt has `timeout_s` seconds, and all of one call `patience_s`. `price` is {input, output} per million tokens.
    Answers are remembered by the whole question (picture, prompt, rubric, model), in `cache` too if that names a
    folder. `structured` asks for the rubric's JSON schema; every answer is checked against it anyway.

    A sample whose question does not apply, because a column that the rubric names is None, is None. One that the judge
    fails is NaN, with the reason. Raises ImageRLError like `Asker`."""

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
        self.rubric = load_rubric(rubric)
        schema = self.rubric.answer_schema if structured and self.rubric.has_form else None
        limits = (concurrency, max_tokens, temperature, schema, price, cache, timeout_s, patience_s)
        self._asker = Asker("judge", endpoint, model, key_env, *limits)

    def __call__(
        self, prompts: list[str], images: list[Image.Image], **columns: list[object]
    ) -> RewardOutput:
        questions: dict[bytes, list[int]] = {}  # what several samples ask alike is asked once
        expected: dict[int, str] = {}
        for row, prompt in enumerate(prompts):
            values = self._values(prompt, {name: column[row] for name, column in columns.items()})
            if values is None:
                continue
            if self.rubric.expect is not None:
                expected[row] = self.rubric.expect.format_map(values)
                if not normalise(expected[row]):
                    continue
            source = columns["reference"][row] if self.rubric.source else None
            questions.setdefault(self._question(values, images[row], source), []).append(row)
        values_of: list[float | None] = [None] * len(prompts)  # not applicable, until asked
        parts: dict[str, list[float | None]] = {}
        reason = None
        for question, said in self._asker.ask(questions).items():
            for row in questions[question]:
                value, found, problem = self._score(said, expected.get(row))
                if row != questions[question][0] and isinstance(said, Said):  # the first bears its costs
                    found |= dict.fromkeys(self._asker.costs(said), 0.0) | {"cached": 1.0}
                elif isinstance(said, Said) and problem is None:
                    self._asker.remember(question, said)
                values_of[row], reason = value, problem or reason
                for name, part in found.items():
                    parts.setdefault(name, [None] * len(prompts))[row] = part
        return RewardOutput(values_of, parts, reason)

    def _values(self, prompt: str, columns: Mapping[str, object]) -> dict[str, str] | None:
        """Return the values for the rubric's braces; None when one of its columns is None here. A missing target
        is the first quoted text of the prompt, as for `ocr`."""
        rubric = f"rubric {self.rubric.name!r} of reward 'judge'"
        if self.rubric.source and "reference" not in columns:
            raise ImageRLError(
                f"{rubric} shows the source of an edit; the prompt set needs the column reference"
            )
        if self.rubric.source and columns["reference"] is None:
            return None
        values = {"prompt": prompt}
        for name in self.rubric.fields:
            value = columns.get(name)
            if value is None and name == "target":
                value = quoted_text(prompt)
            elif name not in columns:
                raise ImageRLError(f"{rubric} names {name!r}, which is no column of the prompt set")
            if value is None:
                return None
            values[name] = str(value)
        return values

    def _question(self, values: Mapping[str, str], image: Image.Image, source: object) -> bytes:
        content = [picture_part(image)]
        if self.rubric.source:
            content = [text_part("Source:"), picture_part(source), text_part("Result:"), *content]
        content.append(text_part(self.rubric.show.format_map(values).strip()))
        return self._asker.question(content, self.rubric.system)

    def _score(self, said: Said | str, expected: str | None) -> tuple[float, dict[str, float], str | None]:
        """Return the value of an answer, its parts and what is wrong with it."""
        if isinstance(said, str):
            return math.nan, {}, said
        costs = self._asker.costs(said)
        try:
            value, marks = self.rubric.score(said.text, expected)
        except ValueError as error:
            return math.nan, costs, str(error)
        return value, marks | costs, None
