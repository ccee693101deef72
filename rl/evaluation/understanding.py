"""Held-out evaluation of a model that reads: are its answers about pictures the right words?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from imagerl.rl.evaluation.evaluate import Evaluation
from imagerl.rl.evaluation.stats import summarise
from imagerl.rl.rollout.engine import with_pictures
from imagerl.rl.types import Prompt

MAX_ANSWER = 16  # tokens


class Reader(Protocol):
    """A model that answers questions; see `models.base.Policy`."""

    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]: ...


def same_answer(given: str, wanted: str) -> bool:
    """Tell whether answers are equal but for case and white space."""
    return "".join(given.split()).lower() == "".join(wanted.split()).lower()


@torch.no_grad()
def evaluate_answers(suite: str, prompts: Sequence[Prompt], reader: Reader, batch_size: int) -> Evaluation:
    """Ask every prompt, a question with the columns `reference`, `answer` and `asked`, and compare.

    `accuracy` is over all of them, `accuracy_<asked>` over one kind of question."""
    rows: list[dict[str, object]] = []
    prompts = [with_pictures(prompt) for prompt in prompts]
    shown = [prompt.columns["reference"] for prompt in prompts]
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        asked = [prompt.text for prompt in batch]
        answers = reader.answer(shown[start : start + batch_size], asked, MAX_ANSWER)
        for prompt, given in zip(batch, answers, strict=True):
            right = float(same_answer(given, prompt.columns["answer"]))
            rows.append(
                {
                    "index": prompt.index,
                    "prompt": prompt.text,
                    "wanted": prompt.columns["answer"],
                    "answer": given,
                    "accuracy": right,
                    f"accuracy_{prompt.columns['asked']}": right,
                }
            )
    return Evaluation(suite, summarise(rows), rows, [np.asarray(picture) for picture in shown])
