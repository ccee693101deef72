"""Rendered pictures on disk: as a folder and as shards they are the same samples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from imagerl.rl.data.image_files import Example, Limits, load_example
from imagerl.rl.data.image_sources import open_source
from imagerl.rl.data.tiny.world import HEIGHT, WIDTH, split_of
from tests.command import exit_code
from tools.tiny.__main__ import tiny
from tools.tiny.render import rendered

LIMITS = Limits(max_pixels=1 << 20, min_side=8, max_aspect=4.0, max_caption_chars=200)


def call(*arguments: str) -> int:
    return exit_code(["render", *arguments], tiny, "tools.tiny")


def samples(folder: Path) -> list[Example]:
    entries = [entry for shard in open_source(str(folder)) for entry in shard.entries()]
    return [load_example(entry, (HEIGHT, WIDTH), LIMITS) for entry in entries]


def test_folder_and_shards_hold_the_same(tmp_path: Path) -> None:
    call(str(tmp_path / "loose"), "--count", "5", "--split", "heldout")
    call(str(tmp_path / "tars"), "--count", "5", "--split", "heldout", "--shard", "2")
    assert sorted(p.name for p in (tmp_path / "tars").iterdir()) == ["000000.tar", "000001.tar", "000002.tar"]
    loose, tars = samples(tmp_path / "loose"), samples(tmp_path / "tars")
    assert [one.caption for one in loose] == [one.caption for one in tars] and len(loose) == 5
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(loose, tars, strict=True))
    words = [re.findall(r'"(\w+)"', one.caption)[0] for one in loose]
    assert {split_of(word) for word in words} == {"heldout"} and len(set(words)) == 5


def test_seed_and_font_change_pictures_not_words(tmp_path: Path) -> None:
    def drawn(seed: int, font: str) -> list[tuple[bytes, str]]:
        return [(png, text) for _, png, text in rendered(3, "train", seed, [font])]

    plain = drawn(0, "DejaVuSansMono.ttf")
    assert drawn(0, "DejaVuSansMono.ttf") == plain
    serif = drawn(0, "DejaVuSerif-Bold.ttf")
    assert [text for _, text in serif] == [text for _, text in plain] and serif != plain
    assert [text for _, text in drawn(1, "DejaVuSansMono.ttf")] != [text for _, text in plain]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for arguments in (("there",), ("new", "--font", "NoSuch.ttf"), ("new", "--split", "tset")):
        assert call(str(tmp_path / arguments[0]), *arguments[1:]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()
