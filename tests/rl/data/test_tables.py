"""Prompts from what `datasets` reads, offline: Parquet, saved folders, a stand-in for the hub; and from JSON lists."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import PromptSetConfig
from imagerl.rl.data.prompt_pictures import picture_hash
from imagerl.rl.data.prompt_sets import PromptSet, load_prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.engine import with_pictures

ROWS = {"caption": ["a cat", "a dog", "a sign"], "answer": ["CAT", "DOG", None]}


def _load(path: Path | str, **settings: Any) -> PromptSet:
    return load_prompt_set(validate_recipe(PromptSetConfig, {"path": str(path), **settings}, "test"))


def _table() -> datasets.Dataset:
    pictures = [Image.new("RGB", (6, 4), (40 * n, 0, 0)) for n in range(3)]
    features = datasets.Features(
        {"caption": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    return datasets.Dataset.from_dict({**ROWS, "image": pictures}, features=features)


def _check(prompts: PromptSet) -> None:
    assert [prompt.text for prompt in prompts] == ROWS["caption"]
    assert [prompt.columns["target"] for prompt in prompts] == ROWS["answer"]
    assert isinstance(prompts.prompts[1].columns["reference"], bytes)  # decoded when it is drawn
    picture = with_pictures(prompts.prompts[1]).reference
    assert picture is not None and picture.getpixel((0, 0)) == (40, 0, 0)
    assert len({picture_hash(prompt) for prompt in prompts}) == 3


def test_parquet_with_pictures_and_columns_of_other_names(tmp_path: Path) -> None:
    _table().to_parquet(tmp_path / "p.parquet")
    _check(_load(tmp_path / "p.parquet", columns={"target": "answer"}))
    assert len(_load(tmp_path / "p.parquet", size=2)) == 2


def test_a_saved_folder_and_its_splits(tmp_path: Path) -> None:
    _table().save_to_disk(tmp_path / "one")
    _check(_load(tmp_path / "one", columns={"target": "answer"}))
    datasets.DatasetDict({"test": _table()}).save_to_disk(tmp_path / "parts")
    _check(_load(tmp_path / "parts", split="test", columns={"target": "answer"}))
    for split in ({"split": "train"}, {}):
        with pytest.raises(ImageRLError, match="has the splits test; name one of them as split"):
            _load(tmp_path / "parts", **split)
    with pytest.raises(ImageRLError, match="may have several splits; name one"):
        _load("hf:owner/name")


def test_a_column_may_be_called_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "answer": "CAT"}\n')
    (prompt,) = _load(tmp_path / "p.jsonl", columns={"target": "answer", "wanted": "answer"})
    assert prompt.columns == {"target": "CAT", "wanted": "CAT"}


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return _table().to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = _load("hf:owner/name", split="test", subset="signs", columns={"target": "answer"}, size=3)
    _check(prompts)
    assert asked == [(("owner/name", "signs"), {"split": "test", "streaming": True})]
    assert prompts.prompts[2].source == "hf:owner/name" and prompts.prompts[2].line == 3


def test_a_list_in_json(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a cat", "answer": "CAT"}, {"prompt": "b"}]))
    prompts = _load(tmp_path / "p.json", columns={"target": "answer"})
    assert [p.columns["target"] for p in prompts] == ["CAT", None]
    (tmp_path / "t.json").write_text('["a cat", "a dog"]')
    assert [p.text for p in _load(tmp_path / "t.json")] == ["a cat", "a dog"]


def test_what_cannot_be_read_is_named_by_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "bad.json").write_text('{"prompt": "a"}')
    (tmp_path / "empty").mkdir()
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "reference": [_png(), b"no picture"]})
    table.to_parquet(tmp_path / "pictures.parquet")
    datasets.Dataset.from_dict({"prompt": ["a", " "]}).to_parquet(tmp_path / "blank.parquet")
    for name, settings, said in (
        ("bad.parquet", {}, r"bad\.parquet: cannot be read as a data set"),
        ("none.parquet", {}, r"there is no file .*none\.parquet"),
        ("bad.json", {}, "should be a list of prompts"),
        ("empty", {}, "empty: cannot be read as a data set"),
        ("pictures.parquet", {}, r"pictures\.parquet, line 2: \"reference\" cannot be read as a picture"),
        ("blank.parquet", {}, r"blank\.parquet, line 2: \"prompt\" should be a text"),
        (
            "blank.parquet",
            {"columns": {"target": "answer"}},
            'no column "answer" to call target, only prompt',
        ),
        ("blank.parquet", {"split": "train"}, "a file has no splits"),
    ):
        with pytest.raises(ImageRLError, match=said):
            _load(tmp_path / name, **settings)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()
