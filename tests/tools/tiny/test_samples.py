"""What is drawn for pretraining: every kind of text, edit and question, and never a held-out text."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from imagerl.rl.data.tiny.world import BACKGROUNDS, FONTS, INKS, split_of, texts, words
from tools.tiny.samples import pretraining_text, random_edit, random_question


def test_pretraining_never_sees_a_heldout_text() -> None:
    rng = random.Random(0)
    drawn = [pretraining_text(rng) for _ in range(5000)]
    assert not set(drawn) & set(texts("heldout"))
    assert all(split_of(text) == "train" for text in drawn)
    assert all(re.fullmatch("[A-Z]{3,6}|[0-9]{3,6}", text) for text in drawn)
    known = sum(text in set(words()) for text in set(drawn))
    assert known > 500 and sum(text.isdigit() for text in drawn) > 400 and len(set(drawn)) > 3000


def test_pretraining_changes_every_part_and_never_sees_a_heldout_text() -> None:
    rng = random.Random(0)
    edits = [random_edit(rng, text_share=0.5) for _ in range(2000)]
    assert all(edit.result != edit.source for edit in edits)
    assert all(
        replace(edit.source, **{edit.part: getattr(edit.result, edit.part)}) == edit.result for edit in edits
    )
    assert 0.45 < sum(edit.part == "text" for edit in edits) / 2000 < 0.55
    assert {edit.value for edit in edits if edit.part == "ink"} == set(INKS)
    assert {edit.value for edit in edits if edit.part == "background"} == set(BACKGROUNDS)
    asked = [random_question(rng, FONTS[:1], text_share=0.8) for _ in range(2000)]
    assert 0.77 < sum(question.part == "text" for question in asked) / 2000 < 0.83
    assert {question.scene.font for question in asked} == {FONTS[0]}
    seen = {text for edit in edits for text in (edit.source.text, edit.result.text)}
    seen |= {question.scene.text for question in asked}
    assert {split_of(text) for text in seen} == {"train"}
