"""Rendered pictures on disk: as a folder and as shards they are the same samples."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from imagerl.rl.data.image_files import Example, Limits, load_example
from imagerl.rl.data.image_sources import open_source
from imagerl.rl.data.tiny import render_folder
from imagerl.rl.data.tiny.world import HEIGHT, WIDTH, split_of

LIMITS = Limits(max_pixels=1 << 20, min_side=8, max_aspect=4.0, max_caption_chars=200)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["render_folder", *arguments])
    render_folder.main()


def samples(folder: Path) -> list[Example]:
    entries = [entry for shard in open_source(str(folder)) for entry in shard.entries()]
    return [load_example(entry, (HEIGHT, WIDTH), LIMITS) for entry in entries]


def test_folder_and_shards_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, str(tmp_path / "loose"), "--count", "5", "--split", "heldout")
    run(monkeypatch, str(tmp_path / "tars"), "--count", "5", "--split", "heldout", "--shard", "2")
    assert sorted(p.name for p in (tmp_path / "tars").iterdir()) == ["000000.tar", "000001.tar", "000002.tar"]
    loose, tars = samples(tmp_path / "loose"), samples(tmp_path / "tars")
    assert [one.caption for one in loose] == [one.caption for one in tars] and len(loose) == 5
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(loose, tars, strict=True))
    words = [re.findall(r'"(\w+)"', one.caption)[0] for one in loose]
    assert {split_of(word) for word in words} == {"heldout"} and len(set(words)) == 5


def test_seed_and_font_change_pictures_not_words(tmp_path: Path) -> None:
    def drawn(seed: int, font: str) -> list[tuple[bytes, str]]:
        return [(png, text) for _, png, text in render_folder.rendered(3, "train", seed, [font])]

    plain = drawn(0, "DejaVuSansMono.ttf")
    assert drawn(0, "DejaVuSansMono.ttf") == plain
    serif = drawn(0, "DejaVuSerif-Bold.ttf")
    assert [text for _, text in serif] == [text for _, text in plain] and serif != plain
    assert [text for _, text in drawn(1, "DejaVuSansMono.ttf")] != [text for _, text in plain]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    for arguments in ((str(tmp_path / "there"),), (str(tmp_path / "new"), "--font", "NoSuch.ttf")):
        with pytest.raises(SystemExit, match=r"^render_folder: [^\n]+$"):
            run(monkeypatch, *arguments)
    assert not (tmp_path / "new").exists()
