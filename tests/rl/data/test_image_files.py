"""Pictures and captions that nobody has checked: what is converted, and every reason to skip one."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagerl.rl.data.image_files import REASONS, BadSample, Blob, Entry, Limits, fit, load_example
from imagerl.rl.files.reading import to_rgb

LIMITS = Limits(max_pixels=10_000, min_side=8, max_aspect=4.0, max_caption_chars=40)
SIZE = (32, 64)
RED = (200, 0, 0)


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def entry(picture: Path | None, caption: str | Path | None = "a word", **more: object) -> Entry:
    text = Blob(str(caption)) if isinstance(caption, Path) else caption
    return Entry("here", Blob(str(picture)) if picture else None, text, **more)  # type: ignore[arg-type]


def reason(one: Entry) -> str:
    with pytest.raises(BadSample) as refused:
        load_example(one, SIZE, LIMITS)
    return refused.value.reason


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises what its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_every_kind_of_bad_sample_has_its_reason(tmp_path: Path) -> None:
    good = saved(tmp_path, Image.new("RGB", (64, 32), RED))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path, Image.fromarray(noise), "whole.jpg").read_bytes()

    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    cases = {
        "missing_picture": [entry(None), entry(tmp_path / "none.png")],
        "missing_caption": [
            entry(good, None),
            entry(good, tmp_path / "none.txt"),
            entry(good, file("other.json", b'{"text": "a"}'), caption_field="caption"),
        ],
        "missing_reference": [entry(good, reference=Blob(str(tmp_path / "none.ref.png")))],
        "bad_caption": [
            entry(good, file("latin.txt", "ä".encode("latin-1"))),
            entry(good, file("cut.json", b'{"caption": "a'), caption_field="caption"),
            entry(good, file("list.json", b'["a"]'), caption_field="caption"),
            entry(good, file("number.json", b'{"caption": 3}'), caption_field="caption"),
            entry(good, file("deep.json", b'{"caption": %s' % (b"[" * 90_000)), caption_field="caption"),
            entry(good, file("half.json", b'{"caption": "\\ud83d"}'), caption_field="caption"),
        ],
        "empty_caption": [entry(good, " \n"), entry(good, file("empty.txt", b""))],
        "long_caption": [entry(good, "a" * 41)],
        "unreadable": [entry(tmp_path), entry(tmp_path / "pipe"), Entry("shard.tar", problem="unreadable")],
        "corrupt": [
            entry(file("text.png", b"no picture at all")),
            entry(file("empty.png", b"")),
            entry(file("crc.png", good.read_bytes().replace(b"IDAT", b"IDAX"))),
            entry(saved(tmp_path, Image.fromarray(np.ones((32, 32), np.float32)), "float.tiff")),
        ],
        "truncated": [
            entry(file("cut.jpg", whole[: len(whole) // 2])),
            Entry("member", Blob(str(good), 10, 1 << 20), "a word"),
        ],
        "too_large": [
            entry(file("bomb.png", png_of_size(60_000, 60_000))),
            entry(file("big.png", png_of_size(101, 100))),
        ],
        "too_small": [entry(saved(tmp_path, Image.new("RGB", (64, 7)), "small.png"))],
        "elongated": [entry(saved(tmp_path, Image.new("RGB", (81, 20)), "long.png"))],
    }
    os.mkfifo(tmp_path / "pipe")
    assert set(cases) == set(REASONS)
    for wanted, entries in cases.items():
        assert [reason(one) for one in entries] == [wanted] * len(entries)


def test_a_bad_reference_is_told_like_a_bad_picture(tmp_path: Path) -> None:
    good = saved(tmp_path, Image.new("RGB", (64, 32), RED))
    (tmp_path / "y.ref.png").write_bytes(b"no picture")
    assert reason(entry(good, reference=Blob(str(tmp_path / "y.ref.png")))) == "corrupt"
    example = load_example(entry(good, " a word\n", reference=Blob(str(good))), SIZE, LIMITS)
    assert example.caption == "a word"
    assert example.reference is not None and (example.reference == RED).all()


def test_modes_become_rgb() -> None:
    grey = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    wanted = np.repeat(grey[..., None], 3, axis=2)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    assert np.array_equal(np.asarray(to_rgb(sixteen)), wanted)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey))), wanted)
    palette = Image.fromarray(wanted).quantize(64)
    assert palette.mode == "P" and np.abs(np.asarray(to_rgb(palette)).astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((100, 100, 100, 255), (0, 0, 4, 8))
    stored = io.BytesIO()
    clear.convert(mode).save(stored, format="PNG")
    pixels = np.asarray(to_rgb(Image.open(stored)))
    assert (pixels[:, 4:] == 255).all() and np.abs(pixels[:, :4].astype(int) - 100).max() <= 2
    half = np.asarray(to_rgb(Image.new("RGBA", (1, 1), (100, 0, 0, 51))))  # 0.2 of it, 0.8 of white
    assert half[0, 0].tolist() == [224, 204, 204]


def test_exif_turns_are_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "white")
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    path = saved(tmp_path, image, "x.png", exif=exif)
    upright = np.asarray(to_rgb(Image.open(path)))
    assert upright.shape == (16, 8, 3) and (upright[:8] == RED).all() and (upright[8:] == 255).all()


def test_pictures_are_cut_to_their_centre() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 16:80] = RED
    assert (np.asarray(fit(Image.fromarray(wide), SIZE)) == RED).all()
    tall = np.zeros((128, 64, 3), np.uint8)
    tall[48:80] = RED
    assert (np.asarray(fit(Image.fromarray(tall), SIZE)) == RED).all()
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(noise), SIZE)), noise)
    twice = np.asarray(fit(Image.fromarray(noise.repeat(2, 0).repeat(2, 1)), SIZE)).astype(int)
    assert np.abs(twice - noise).mean() < 30  # averaged down, not picked apart


def test_json_captions_name_their_field(tmp_path: Path) -> None:
    good = saved(tmp_path, Image.new("RGB", (64, 32), RED))
    (tmp_path / "x.json").write_text(json.dumps({"text": "from JSON"}))
    one = load_example(entry(good, tmp_path / "x.json", caption_field="text"), SIZE, LIMITS)
    assert one.caption == "from JSON" and one.picture.shape == (32, 64, 3) and one.picture.dtype == np.uint8
