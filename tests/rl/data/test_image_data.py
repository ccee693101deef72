"""Folders, shards and the stream over them: order, mixing, ranks, resuming, bad samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagerl.rl.data.image_data import ImageStream, ShuffledSource, first_examples
from imagerl.rl.data.image_files import BadSample, Entry, Example
from imagerl.rl.data.image_sources import open_source
from imagerl.rl.errors import ImageRLError

PICTURE = np.zeros((1, 1, 3), np.uint8)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def names(entries: Sequence[Entry]) -> list[str]:
    return [Path(entry.key.rpartition(":")[2]).name for entry in entries]


# ---- listing -----------------------------------------------------------------------------------------------


def test_a_folder_is_listed_by_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.webp", "d.png", "d.ref.png", ".hidden.png", "alone.ref.png"):
        (tmp_path / name).write_bytes(png())
    for name in ("a.txt", "b.txt", "deep/c.txt", "d.txt", "README.txt"):
        (tmp_path / name).write_text(f"caption of {name}")
    (shard,) = open_source(str(tmp_path))
    entries = shard.entries()
    assert names(entries) == ["a.JPG", "alone.ref.png", "b.png", "d.png", "c.webp"]
    assert [entry.caption is not None for entry in entries] == [True, False, True, True, True]
    assert [entry.reference is not None for entry in entries] == [False, False, False, True, False]


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_folder_with_a_list(tmp_path: Path, name: str) -> None:
    rows: list[Any] = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "text": "two", "reference": "a.png"},
        {"text": "no file"},
        ["no object"],
        {"file_name": "a.png"},
        {"file_name": "a.png", "text": "x", "reference": 3},
    ]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + '\n\n{"file_name": "cut')
    (tmp_path / "a.png").write_bytes(png())
    entries = open_source(str(tmp_path), "text")[0].entries()
    assert [entry.caption for entry in entries] == ["one", "two", None, None, None, None, None]
    problems = [None, None, "missing_picture", "bad_caption", None, "bad_caption", "bad_caption"]
    assert [entry.problem for entry in entries] == problems
    assert entries[1].reference is not None and entries[1].reference.read() == png()


def test_a_shard_is_read_in_place(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "000.tar",
        {
            "in/0.png": png("blue"),
            "in/0.txt": b"zero",
            "1.txt": b"one",
            "1.jpg": png(),
            "1.ref.png": png("blue"),
            "1.seg.png": png(),  # another modality, ours to ignore
            "2.json": b'{"caption": "two"}',
            "2.webp": png(),
            "3.txt": b"a picture is missing",
            "4.png": png(),
            "5.cls": b"7",
            "._6.png": b"what a Mac leaves",
        },
    )
    (shard,) = open_source(str(path))
    entries = shard.entries()
    assert [entry.key.rpartition(":")[2] for entry in entries] == ["in/0", "1", "2", "3", "4"]
    assert [entry.picture is not None for entry in entries] == [True, True, True, False, True]
    assert [entry.caption is not None for entry in entries] == [True, True, True, True, False]
    assert [entry.caption_field for entry in entries][:3] == [None, None, "caption"]
    assert [entry.reference is not None for entry in entries] == [False, True, False, False, False]
    assert entries[0].picture is not None and entries[0].picture.read() == png("blue")
    assert entries[1].reference is not None and entries[1].reference.read() == png("blue")


def test_a_damaged_shard_gives_what_is_whole(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": data for i in range(4) for kind, data in (("png", png()), ("txt", b"word"))}
    whole = write_tar(tmp_path / "0.tar", members).read_bytes()
    for length, kept in ((len(whole), 4), (4 * 1024 + 540, 2), (4 * 1024 + 100, 2), (100, 0)):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        entries = open_source(str(tmp_path / "cut.tar"))[0].entries()
        problems = [entry.problem for entry in entries if entry.problem]
        assert len(entries) - len(problems) == kept
        assert problems == ([] if length == len(whole) else ["truncated" if kept else "unreadable"])
    (tmp_path / "cut.tar").write_bytes(whole[:4096] + b"?" * 512 + whole[4608:])  # a header in the middle
    problems = [entry.problem for entry in open_source(str(tmp_path / "cut.tar"))[0].entries()]
    assert problems == [None, None, "truncated"]
    (tmp_path / "cut.tar").write_bytes(whole[: whole.rindex(b"word") + 512])  # no end mark, all there
    assert len(open_source(str(tmp_path / "cut.tar"))[0].entries()) == 4
    (tmp_path / "cut.tar").write_bytes(b"<html>404</html>" * 100)
    assert [e.problem for e in open_source(str(tmp_path / "cut.tar"))[0].entries()] == ["unreadable"]


def test_sources_are_found_or_refused_in_one_line(tmp_path: Path) -> None:
    shards, empty, both = tmp_path / "shards", tmp_path / "empty", tmp_path / "both"
    for folder in (shards, empty, both):
        folder.mkdir()
    for name in ("1.tar", "0.tar"):
        write_tar(shards / name, {"a.png": png()})
    expected = [str(shards / "0.tar"), str(shards / "1.tar")]
    for path in (shards, f"{shards}/*.tar"):
        assert [shard.path for shard in open_source(str(path))] == expected  # type: ignore[attr-defined]
    write_tar(both / "0.tar", {})
    (both / "x.png").write_bytes(png())
    (tmp_path / "0.tar.gz").write_bytes(b"")
    mistakes = {
        "shard": 'did you mean "',
        "nothing/*.tar": "there is nothing at",
        "empty": "holds neither pictures",
        "both": "holds both tar shards and pictures",
        "0.tar.gz": "is compressed; unpack it",
        "both/x.png": "is no .tar file",
    }
    for path, message in mistakes.items():
        with pytest.raises(ImageRLError, match=message) as error:
            open_source(str(tmp_path / path))
        assert "\n" not in str(error.value)
    for name in ("captions.jsonl", "metadata.jsonl"):
        (empty / name).write_text("{}")
    with pytest.raises(ImageRLError, match="both captions"):
        open_source(str(empty))[0].entries()


# ---- the stream --------------------------------------------------------------------------------------------


class Listed:
    """A shard of `count` samples called `<name>0`, `<name>1`, ..."""

    def __init__(self, name: str, count: int, bad: Sequence[int] = ()) -> None:
        self.path = name
        self.listed = [
            Entry(f"{name}{i}", problem="truncated" if i in bad else None, caption="") for i in range(count)
        ]

    def entries(self) -> list[Entry]:
        return list(self.listed)


def load(entry: Entry) -> Example:
    if entry.problem:
        raise BadSample(entry.problem)
    return Example(entry.key, PICTURE, entry.key, None)


def shards(bad: Sequence[int] = ()) -> list[Listed]:
    return [Listed(name, 5, bad) for name in "abcd"]


def stream(
    *sources: Sequence[Listed], weights: Sequence[float] = (), seed: int = 0, **options: Any
) -> ImageStream:
    opened = [ShuffledSource(f"source {i}", one, seed, i, 2) for i, one in enumerate(sources)]
    options = {"max_bad_share": 0.9} | options
    return ImageStream(opened, weights or [1.0] * len(sources), seed, load, **options)


def keys(one: ImageStream, count: int) -> list[str]:
    return [drawn.example.key for drawn in one.take(count)]


def test_an_epoch_gives_every_sample_once_in_an_order_of_its_own() -> None:
    everything = sorted(f"{name}{i}" for name in "abcd" for i in range(5))
    one = stream(shards())
    first, second = keys(one, 20), keys(one, 20)
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert one.epoch == 1
    assert keys(stream(shards()), 20) == first
    assert keys(stream(shards(), seed=1), 20) != first
    # groups of two shards, mixed within and in another order each epoch
    group = [key[0] for key in first[:10]]
    assert len(set(group)) == 2 and len(set(group[:5])) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [(), (1, 3)])
def test_a_resumed_stream_goes_on_as_if_never_stopped(workers: int, bad: tuple[int, ...]) -> None:
    options = {"workers": workers, "ahead": 7 * workers}
    sources = (shards(bad), [Listed("x", 3)])
    whole = stream(*sources, **options)
    wanted = [keys(whole, 4) for _ in range(12)]
    for stop in (1, 5, 9):
        before = stream(*sources, **options)
        assert [keys(before, 4) for _ in range(stop)] == wanted[:stop]
        state = json.loads(json.dumps(before.state()))  # as a checkpoint keeps it
        before.close()
        after = stream(*sources, **options, states=[state])
        assert [keys(after, 4) for _ in range(12 - stop)] == wanted[stop:]
        assert after.counts.seen == whole.counts.seen and after.counts.bad == whole.counts.bad
        after.close()
    whole.close()


def test_ranks_share_what_one_process_sees() -> None:
    sources = (shards(), [Listed("x", 3)])
    alone = stream(*sources)
    together = [stream(*sources, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(9):
        shares = [one.take(3) for one in together]
        numbers = [[drawn.number for drawn in share] for share in shares]
        assert not set(numbers[0]) & set(numbers[1])
        wanted = {drawn.number: drawn.example.key for drawn in alone.take(6)}
        assert {drawn.number: drawn.example.key for share in shares for drawn in share} == wanted


def test_ranks_see_each_sample_once_in_an_epoch() -> None:
    ranks = [stream(shards(), rank=rank, world_size=2) for rank in range(2)]
    first, second = (keys(one, 10) for one in ranks)
    assert not set(first) & set(second) and len(set(first + second)) == 20


def test_a_checkpoint_of_two_processes_serves_one_or_three() -> None:
    sources = (shards(), [Listed("x", 3)])
    alone = stream(*sources)
    two = [stream(*sources, rank=rank, world_size=2) for rank in range(2)]
    for one in two:
        one.take(6)
    keys(alone, 12)
    wanted = sorted(keys(alone, 12))
    states = [one.state() for one in two]
    for size in (1, 3):
        resumed = [stream(*sources, rank=rank, world_size=size, states=states) for rank in range(size)]
        assert sorted(key for one in resumed for key in keys(one, 12 // size)) == wanted
        assert sum(one.counts.seen for one in resumed) == 24


def test_sources_are_mixed_by_weight() -> None:
    drawn = keys(stream([Listed("a", 7)], [Listed("b", 50)], weights=[3.0, 1.0]), 2000)
    counted = Counter(key[0] for key in drawn)
    assert counted["a"] / 2000 == pytest.approx(0.75, abs=0.04)  # 4 standard deviations
    assert len({key for key in drawn if key[0] == "b"}) == 50


def test_bad_samples_are_skipped_and_counted() -> None:
    one = stream(shards(bad=[2]))
    assert len(keys(one, 16)) == 16  # an epoch: 4 of 20 are bad
    assert one.counts.bad == {"truncated": one.counts.seen - 16} and one.counts.seen <= 20


def test_too_many_bad_samples_stop_with_the_reasons() -> None:
    with pytest.raises(
        ImageRLError, match=r"9 of 21 samples are bad .*is 0.3.*: truncated 9 such as [abcd]\d"
    ) as error:
        stream(shards(bad=[2, 4]), max_bad_share=0.3).take(1000)
    assert "\n" not in str(error.value)
    stream(shards(bad=[2, 4]), max_bad_share=0.5).take(1000)
    with pytest.raises(ImageRLError, match="20 of 20 samples are bad"):
        stream([Listed("a", 1, [0])]).take(1)


def test_a_source_without_samples_is_refused() -> None:
    with pytest.raises(ImageRLError, match="source 0 holds no samples"):
        stream([Listed("a", 0), Listed("b", 0), Listed("c", 0)]).take(1)
    assert len(keys(stream([Listed("a", 0), Listed("b", 0), Listed("c", 1)]), 3)) == 3


def test_files_that_have_changed_are_not_resumed() -> None:
    one = stream(shards())
    one.take(3)
    changed = [*shards()[:3], Listed("e", 5)]
    for sources in (changed, shards()[:1], [Listed(name, 6) for name in "abcd"]):
        with pytest.raises(ImageRLError, match="the files of source 0 are not those of the checkpoint"):
            stream(sources, states=[one.state()])


def test_heldout_samples_are_the_first_good_ones_of_each_source() -> None:
    sources = [
        ShuffledSource(name, [Listed(name, count, bad)], 0, 0, 1)
        for name, count, bad in (("a", 5, [0]), ("b", 2, []))
    ]
    examples, counts = first_examples(sources, 5, load)
    assert [example.key for example in examples] == ["a1", "b0", "a2", "b1", "a3"]
    assert counts.bad == {"truncated": 1} and counts.seen == 6
    assert len(first_examples(sources, 99, load)[0]) == 6
