from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagerl.rewards.ocr.reward import exact_match, target_of, wanted_text
from imagerl.rl.config.recipe import read_recipe
from imagerl.rl.config.train import PromptSetConfig, load_recipe
from imagerl.rl.data.prompt_sets import PromptSet, load_prompt_set, refuse_overlap
from imagerl.rl.data.seeding import GroupedSampler
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files import reading
from imagerl.rl.types import Prompt

RECIPES = Path(__file__).parents[3] / "recipes"


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, **settings: object) -> PromptSet:
    return load_prompt_set(PromptSetConfig.model_validate({"path": str(path), **settings}))


def error(path: Path, **settings: object) -> str:
    with pytest.raises(ImageRLError) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, f"prompt {i}") for i in range(count))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "a cat", "target": "CAT"}\n\n{"prompt": "a ö", "target": null}\n'),
        ("a.csv", "target,prompt\nCAT,a cat\n,a ö\n"),
        ("a.yaml", "- prompt: a cat\n  target: CAT\n- prompt: a ö\n"),
        ("a.yml", "- {prompt: a cat, target: CAT}\n- a ö\n"),
        ("a.jsonl", '\ufeff{"prompt": "a cat", "target": "CAT"}\r\n{"prompt": "a ö"}'),
    ],
)
def test_formats_give_the_same_prompts(tmp_path: Path, name: str, text: str) -> None:
    loaded = load(write(tmp_path, name, text))
    assert [(p.index, p.text) for p in loaded] == [(0, "a cat"), (1, "a ö")]
    assert loaded.columns == ["target"]
    first, second = loaded.prompts
    assert first.columns == {"target": "CAT"}
    assert second.columns["target"] in (None, "")


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "a.txt", '\n one, "two" \n\nthree: {four}\n'))
    assert [p.text for p in loaded] == ['one, "two"', "three: {four}"]
    assert loaded.columns == []


def test_size_keeps_the_first_and_column_chooses(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "caption,prompt\nx,1\ny,2\nz,3\n")
    loaded = load(path, size=2, column="caption")
    assert [(p.index, p.text, p.columns) for p in loaded] == [
        (0, "x", {"prompt": "1"}),
        (1, "y", {"prompt": "2"}),
    ]
    assert "has 3 prompts, fewer than its size in the recipe, 4" in error(path, size=4)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'line 2: no column "prompt", only text'),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: should be a mapping"),
        ("a.jsonl", '{"prompt": 5}\n', 'line 1: "prompt" should be a text'),
        ("a.jsonl", '{"prompt": " "}\n', 'line 1: "prompt" should be a text that is not empty'),
        (
            "a.jsonl",
            '{"prompt": "a", "completions": 1}\n',
            'line 1: "completions" is what rewards get from us',
        ),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "self": 1}\n', 'line 2: "self" is what rewards get'),
        ("a.jsonl", '{"prompt": "\\ud83d"}\n', "line 1: a text holds half of a surrogate pair"),
        ("a.jsonl", '{"prompt": "a", "n": %s}\n' % ("9" * 5000), "line 1: not JSON (Exceeds the limit"),
        (
            "a.jsonl",
            '{"prompt": "a", "n": %s}\n' % ("9" * 20),
            "line 1: a whole number has more than 64 bits",
        ),
        ("a.jsonl", '{"prompt": "a", "n": 1e400}\n', "line 1: a number is not finite"),
        ("a.jsonl", '{"prompt": "a", "n": [NaN]}\n', "line 1: a number is not finite"),
        ("a.jsonl", '{"prompt": "a", "n": %s}\n' % ("[" * 90_000 + "]" * 90_000), "nested more than 32 deep"),
        ("a.jsonl", '{"prompt": "a", "n": %s}\n' % ("[" * 40 + "]" * 40), "nested more than 32 deep"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1: not JSON ('prompt' is given twice)"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b"\n',
            "line 2: not JSON (Expecting ',' delimiter, column 15)",
        ),
        ("a.csv", "prompt,x,x\na,1,2\n", 'names the column "x" twice'),
        ("a.csv", "prompt,x\na,1\nb\n", "line 3: not the 2 fields of the header"),
        ("a.csv", "prompt,x\na,1\nb,2,3\n", "line 3: not the 2 fields of the header"),
        ("a.csv", 'prompt\n"a\n', "not CSV"),
        ("a.yaml", "- a\n- b\n- {text: c}\n", 'line 3: no column "prompt"'),
        ("a.yaml", "prompt: a\n", "should be a list"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.csv", "prompt,x\n", "holds no prompts"),
        ("a.odt", "", "name it .jsonl, .json, .csv, .txt, .yaml or .parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, part: str) -> None:
    path = write(tmp_path, name, text)
    message = error(path)
    assert part in message
    assert str(path) in message


def test_only_regular_files_of_a_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe" in error(tmp_path / "pipe.jsonl")
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.truncate(reading.MAX_BYTES + 1)
    assert f"has {reading.MAX_BYTES + 1} bytes" in error(tmp_path / "huge.jsonl")


def test_a_prompt_may_stand_twice(tmp_path: Path) -> None:
    """As in the public files of GenEval and DrawBench: each row is a prompt of its own, told apart by its index."""
    loaded = load(write(tmp_path, "a.txt", "a\nb\n\na\n"))
    assert [(p.index, p.text) for p in loaded] == [(0, "a"), (1, "b"), (2, "a")]
    sampler = GroupedSampler(loaded, 3, seed=0)
    assert sorted(p.index for p in sampler.step(0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "taken"),
    [
        ("drawbench.csv", "Prompts,Category\na,Colors\na,Colors\n", "Prompts"),
        ("parti.csv", "Prompt,Note\na,\na,\n", "Prompt"),
        ("captions.jsonl", '{"caption": "a"}\n{"caption": "a"}\n', "caption"),
    ],
)
def test_prompts_of_public_sets_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str, taken: str
) -> None:
    loaded = load(write(tmp_path, name, text))
    assert [p.text for p in loaded] == ["a", "a"] and taken not in loaded.columns
    (said,) = caplog.messages
    assert f'took the column "{taken}" as the prompt' in said
    assert f'no column "words", only {taken}' in error(tmp_path / name, column="words")


def test_missing_file(tmp_path: Path) -> None:
    assert "no file" in error(tmp_path / "none.txt")


def test_named_sets() -> None:
    config = PromptSetConfig(name="tiny_world", split="heldout", size=20, seed=3)
    loaded = load_prompt_set(config)
    assert len(loaded) == 20
    assert loaded.source == "tiny_world/heldout"
    assert "target" in loaded.columns
    assert loaded == load_prompt_set(config)
    with pytest.raises(ImageRLError, match=r"no prompt set is named.*tiny_world"):
        load_prompt_set(PromptSetConfig(name="tiny_word", split="train"))


def test_tiny_world_splits_do_not_overlap() -> None:
    train, heldout = (
        load_prompt_set(PromptSetConfig(name="tiny_world", split=s)) for s in ("train", "heldout")
    )
    refuse_overlap(train, heldout, wanted_text)
    with pytest.raises(ImageRLError, match=f"{len(train)} prompts of data.heldout"):
        refuse_overlap(train, train, wanted_text)


def test_overlapping_targets_are_refused() -> None:
    train = PromptSet("a", (Prompt(0, "red CAT", {"target": "CAT"}), Prompt(1, "x", {"target": None})))
    heldout = PromptSet("b", (Prompt(0, "blue CAT", {"target": "CAT"}), Prompt(1, "y", {"target": None})))
    with pytest.raises(ImageRLError, match=r'1 targets of data.heldout \(b\).*\(a\).*"cat"'):
        refuse_overlap(train, heldout, wanted_text)
    refuse_overlap(PromptSet("c", train.prompts[1:]), heldout, wanted_text)


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ({"prompt": "a sign", "target": "STOP"}, {"prompt": "a board", "target": "stop"}),
        ({"prompt": "a sign", "target": "S T O P"}, {"prompt": "a board", "target": " Stop "}),
        ({"prompt": 'a sign that says "Stop"'}, {"prompt": "a board that reads “STOP”"}),
        ({"prompt": "a sign", "target": "stop"}, {"prompt": "a 'STOP' sign"}),
        ({"prompt": "a sign", "target": 472}, {"prompt": "a board", "target": "472"}),
        ({"prompt": "a sign", "target": "ＳＴＯＰ"}, {"prompt": "a board", "target": "stop"}),
        ({"prompt": "a cat in a hat"}, {"prompt": "A  cat in a Hat"}),
    ],
)
def test_what_the_rewards_do_not_tell_apart_overlaps(
    tmp_path: Path, trained: dict[str, Any], held_out: dict[str, Any]
) -> None:
    """Held to the reward's own comparison: a picture that shows one text is exact for the other."""
    filler = {"prompt": 'a door that says "EXIT"'}
    rows = {"train": [filler, trained], "heldout": [{"prompt": 'a door that says "WAY IN"'}, held_out]}
    sets = []
    for name, own in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, own)))
        sets.append(load_prompt_set(PromptSetConfig(path=str(tmp_path / f"{name}.jsonl"))))
    with pytest.raises(ImageRLError, match=r"heldout\.jsonl.*train\.jsonl.*of line 3 in line 3; .*lines 3$"):
        refuse_overlap(*sets, wanted_text)
    texts = [target_of(row.get("target"), row["prompt"]) for row in (trained, held_out)]
    assert texts == [None, None] or exact_match(*texts) == 1.0  # type: ignore[arg-type]


def test_columns_that_are_no_texts_are_not_compared() -> None:
    """A column `target` may be another reward's."""
    sets = [PromptSet(name, (Prompt(0, name, {"target": [1, 2]}),)) for name in ("a", "b")]
    refuse_overlap(*sets, wanted_text)


def test_an_edit_overlaps_by_its_picture_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("copy", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    sets = {}
    for name in ("a", "copy", "b"):
        row = {"prompt": "paint it", "reference": f"{name}.png"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        sets[name] = load_prompt_set(PromptSetConfig(path=str(tmp_path / f"{name}.jsonl")))
    refuse_overlap(sets["a"], sets["b"], wanted_text)
    with pytest.raises(ImageRLError, match=r'1 prompts of data\.heldout.*"paint it" of line 1 in line 1'):
        refuse_overlap(sets["a"], sets["copy"], wanted_text)


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_sets_of_the_shipped_recipes_do_not_overlap(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    if read_recipe(recipe).get("kind", "train") == "train":
        data = load_recipe(recipe).data
        if (path := data.train.path) and path.startswith("runs/") and not Path(path).exists():
            pytest.skip(f"{path} is made by what the recipe's header says")
        refuse_overlap(load_prompt_set(data.train), load_prompt_set(data.heldout), wanted_text)


@pytest.mark.parametrize(("count", "per_step"), [(12, 3), (13, 4), (5, 5), (7, 1)])
def test_an_epoch_repeats_no_prompt(count: int, per_step: int) -> None:
    sampler = GroupedSampler(prompts(count), per_step, seed=0)
    assert sampler.steps_per_epoch == count // per_step
    epochs = []
    for epoch in range(3):
        first = epoch * sampler.steps_per_epoch
        drawn = [p.index for k in range(first, first + sampler.steps_per_epoch) for p in sampler.step(k)]
        assert len(drawn) == len(set(drawn)) == per_step * sampler.steps_per_epoch
        epochs.append(drawn)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_needs_no_replay_and_follows_the_seed() -> None:
    sampler = GroupedSampler(prompts(20), 6, seed=1)
    forward = [sampler.step(k) for k in range(10)]
    assert [sampler.step(k) for k in reversed(range(10))] == forward[::-1]
    assert GroupedSampler(prompts(20), 6, seed=1).step(7) == forward[7]
    assert GroupedSampler(prompts(20), 6, seed=2).step(7) != forward[7]


def test_the_order_never_changes() -> None:
    """Runs of an earlier version must resume on the same prompts."""
    drawn = [[p.index for p in GroupedSampler(prompts(10), 4, seed=0).step(k)] for k in (0, 1, 5)]
    assert drawn == [[9, 7, 4, 6], [8, 0, 1, 2], [0, 7, 6, 9]]


def test_too_few_prompts_for_a_step() -> None:
    with pytest.raises(
        ImageRLError, match=r"rollout.prompts_per_step is 4 but data.train has only 3 prompts"
    ):
        GroupedSampler(prompts(3), 4, seed=0)
