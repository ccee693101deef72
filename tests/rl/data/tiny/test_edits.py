from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import ImageChops

from imagerl.rewards.ocr.reward import wanted_text
from imagerl.rl.config.train import PromptSetConfig
from imagerl.rl.data.prompt_sets import load_prompt_set, refuse_overlap
from imagerl.rl.data.tiny.edits import (
    PARTS,
    Edit,
    Question,
    edit_set,
    edits_of,
    question_set,
)
from imagerl.rl.data.tiny.world import BACKGROUNDS, FONTS, INKS, Scene, prompt_set, render, split_of, texts
from imagerl.rl.errors import ImageRLError

RIVER = Scene("RIVER", "red", "white", FONTS[1])


@pytest.mark.parametrize(
    ("part", "value", "instruction", "result"),
    [
        ("text", "OCEAN", 'replace the text with "OCEAN"', Scene("OCEAN", "red", "white", FONTS[1])),
        ("ink", "blue", "change the text colour to blue", Scene("RIVER", "blue", "white", FONTS[1])),
        ("background", "pink", "change the background to pink", Scene("RIVER", "red", "pink", FONTS[1])),
    ],
)
def test_an_edit_changes_one_part_and_keeps_the_rest(
    part: str, value: str, instruction: str, result: Scene
) -> None:
    edit = Edit(RIVER, part, value)
    assert edit.instruction == instruction and edit.result == result
    columns = edit.columns()
    assert columns["edited"] == part
    assert columns["reference"] == render(RIVER) and columns["ideal"] == render(result)
    assert columns["target"] == result.text
    assert (columns["caption_before"], columns["caption_after"]) == (RIVER.caption, result.caption)
    assert columns["ink_rgb"] == list(INKS[result.ink])
    assert columns["background_rgb"] == list(BACKGROUNDS[result.background])


def test_questions_have_the_answers_that_one_sees() -> None:
    asked = {part: Question(RIVER, part) for part in PARTS}
    assert [question.text for question in asked.values()] == [
        "what is written?",
        "what colour is the text?",
        "what colour is the background?",
    ]
    assert [question.answer for question in asked.values()] == ["RIVER", "red", "white"]
    assert asked["ink"].columns() == {"asked": "ink", "answer": "red", "reference": render(RIVER)}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sets_show_and_ask_for_texts_of_their_split(split: str) -> None:
    edits, questions = edit_set(split, 60), question_set(split, 60)
    assert [prompt.index for prompt in edits] == list(range(60))
    assert [prompt.columns["edited"] for prompt in edits] == list(PARTS) * 20
    assert [prompt.columns["asked"] for prompt in questions] == list(PARTS) * 20
    assert [prompt.columns["target"] for prompt in edits] == list(texts(split)[:60])
    for prompt, edit in zip(edits, edits_of(split, 60), strict=True):
        assert split_of(edit.source.text) == split_of(edit.result.text) == split
        assert (edit.source.text != edit.result.text) == (prompt.columns["edited"] == "text")
        assert ImageChops.difference(prompt.columns["reference"], prompt.columns["ideal"]).getbbox()
        assert prompt.columns["reference"] == render(edit.source)


def test_a_set_of_edits_of_the_text_alone() -> None:
    config = PromptSetConfig(name="tiny_text_edits", split="heldout", size=60)
    prompts = load_prompt_set(config).prompts
    assert {prompt.columns["edited"] for prompt in prompts} == {"text"}
    assert [prompt.columns["target"] for prompt in prompts] == list(texts("heldout")[:60])
    edits = edits_of("heldout", 60, parts=("text",))
    assert all(edit.source.text != edit.result.text == edit.value for edit in edits)
    assert all(replace(edit.source, text=edit.value) == edit.result for edit in edits)


def test_sets_are_prefixes_of_each_other_and_the_seed_changes_them() -> None:
    small, large, other = edit_set("train", 9), edit_set("train", 30), edit_set("train", 9, seed=1)
    assert small == large[:9] and small != other
    assert [prompt.columns["target"] for prompt in small] == [prompt.columns["target"] for prompt in other]
    assert question_set("train", 9) == question_set("train", 30)[:9] != question_set("train", 9, seed=1)
    assert small[0].reference == small[0].columns["reference"]


def test_more_cases_than_there_are_is_refused() -> None:
    for make in (prompt_set, edit_set, question_set):
        with pytest.raises(ImageRLError, match=rf"has {len(texts('heldout'))} prompts, not 99999; "):
            make("heldout", 99999)


def test_edits_are_a_prompt_set_in_which_a_picture_tells_equal_instructions_apart() -> None:
    train, heldout = (
        load_prompt_set(PromptSetConfig(name="tiny_edits", split=split, size=60))
        for split in ("train", "heldout")
    )
    assert len({prompt.text for prompt in train}) < 60
    assert {"target", "edited", "reference", "ideal"} <= set(train.columns)
    refuse_overlap(train, heldout, wanted_text)
    with pytest.raises(ImageRLError, match=r"60 prompts of data\.heldout"):
        refuse_overlap(train, train, wanted_text)
