from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from PIL import Image

from imagerl.rl.data.tiny.edits import question_set
from imagerl.rl.evaluation.understanding import evaluate_answers, same_answer

PROMPTS = question_set("heldout", 9)


class Parrot:
    """Knows the answers to pictures by their bytes, and gets one kind of question wrong."""

    def __init__(self, wrong: str | None = None) -> None:
        self.known = {(p.text, p.columns["reference"].tobytes()): p.columns for p in PROMPTS}
        self.batches: list[int] = []
        self.wrong = wrong

    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        assert max_new_tokens >= 7  # six capitals and the end of the turn
        self.batches.append(len(questions))
        found = [
            self.known[question, picture.tobytes()]
            for question, picture in zip(questions, pictures, strict=True)
        ]
        return ["nothing" if c["asked"] == self.wrong else c["answer"].lower() for c in found]


@pytest.mark.parametrize(
    ("given", "same"), [("RIVER", True), (" r i v e r\n", True), ("RIVERS", False), ("", False)]
)
def test_answers_are_the_same_but_for_case_and_white_space(given: str, same: bool) -> None:
    assert same_answer(given, "RIVER") == same


def test_a_perfect_reader_is_always_right() -> None:
    reader = Parrot()
    result = evaluate_answers("understanding", PROMPTS, reader, 4)
    assert reader.batches == [4, 4, 1]
    assert {name: value.mean for name, value in result.metrics.items()} == {
        "accuracy": 1.0,
        "accuracy_text": 1.0,
        "accuracy_ink": 1.0,
        "accuracy_background": 1.0,
    }
    assert np.stack(result.images).shape == (9, 32, 64, 3)
    assert np.array_equal(result.images[4], np.asarray(PROMPTS[4].columns["reference"]))


def test_kinds_of_questions_are_counted_apart() -> None:
    result = evaluate_answers("understanding", PROMPTS, Parrot(wrong="ink"), 9)
    assert result.metrics["accuracy"].mean == pytest.approx(2 / 3) and result.metrics["accuracy"].n == 9
    assert result.metrics["accuracy_ink"].mean == 0.0 and result.metrics["accuracy_ink"].n == 3
    assert result.metrics["accuracy_text"].mean == 1.0
    row = result.per_prompt[1]
    assert row["answer"] == "nothing" and row["wanted"] == PROMPTS[1].columns["answer"]
    assert row["accuracy"] == 0.0
