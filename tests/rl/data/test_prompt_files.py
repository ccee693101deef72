"""Prompt files from anywhere: each gives prompts that every reward can take, or is refused in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagerl.rl.config.train import PromptSetConfig
from imagerl.rl.data.prompt_sets import RESERVED_COLUMNS, load_prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import MAX_PIXELS
from imagerl.rl.rollout.engine import with_pictures

FILES = 200
HANGS_S = 20.0
NAMES = (
    *(
        "prompt",
        "Prompt",
        "prompts",
        "caption",
        "text",
        "instruction",
        "target",
        "reference",
        "image",
        "images",
    ),
    *("source_image", "mask", "ideal", "self", "completions", "", "größe", "\ud83d", "a" * 5000),
)
VALUES: tuple[Any, ...] = (
    *("a cat", "", "  ", "\ud83d", "é" * 300, "x\0y", "\u202e", "..", "a" * 5000, "http://127.0.0.1/x.png"),
    *("ok.png", "cut.png", "bomb.png", "pipe.png", "page.eps", "/dev/zero"),
    *(None, True, 0, 10**30, -1.5, float("nan"), float("inf")),
    *([], ["ok.png"], ["ok.png", "ok.png"], [None], {}, {"a": {"b": []}}),
)


def png(width: int, height: int) -> bytes:
    """A PNG of one colour, a bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that rows may name."""
    folder = tmp_path_factory.mktemp("prompts")
    Image.new("RGB", (8, 4), "red").save(folder / "ok.png")
    (folder / "cut.png").write_bytes((folder / "ok.png").read_bytes()[:60])
    (folder / "bomb.png").write_bytes(png(13_000, 13_000))
    Image.new("RGB", (8, 4)).save(folder / "page.eps")
    os.mkfifo(folder / "pipe.png")
    return folder


def rows_of(rng: random.Random) -> list[Any]:
    rows: list[Any] = []
    for number in range(rng.randint(1, 4)):
        row: dict[str, Any] = {"prompt": f"a cat {number}", "target": "CAT"}
        for _ in range(rng.randint(0, 2)):
            row[rng.choice(NAMES)] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del row["prompt"]
            row[rng.choice(NAMES)] = "a dog"
        rows.append(row if rng.random() < 0.9 else rng.choice(VALUES))
    return rows


def as_jsonl(rows: list[Any], rng: random.Random) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def as_csv(rows: list[Any], rng: random.Random) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    mappings = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a"}]
    names = [name for row in mappings for name in row]  # some twice
    if rng.random() < 0.7:
        names = list(dict.fromkeys(names))
    writer.writerow(names)
    writer.writerows([[row.get(name) for name in names] for row in mappings])
    return buffer.getvalue().encode(errors="surrogatepass")


def as_txt(rows: list[Any], rng: random.Random) -> bytes:
    return "\n".join(map(str, rows)).encode(errors="surrogatepass")


def as_yaml(rows: list[Any], rng: random.Random) -> bytes:
    return b"\n".join(b"- " + json.dumps(row).encode() for row in rows)


FORMATS: dict[str, Callable[[list[Any], random.Random], bytes]] = {
    ".jsonl": as_jsonl,
    ".csv": as_csv,
    ".txt": as_txt,
    ".yaml": as_yaml,
}


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The file as it is, more often than not, or damaged."""
    deep, digits = b'{"prompt": ' + b"[" * 50_000, b'{"prompt": "a", "n": %s}' % (b"9" * 5000)
    ways = (
        data[: rng.randrange(len(data) + 1)],
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        bytes(rng.randrange(256) for _ in range(100)),
        deep,
        digits,
        b'{"prompt": "a", "prompt": "b"}\n' + data,
        data + b'\n{"prompt": "a", "x": 1e999}',
        data + b"\0",
        b'"' + b"x" * 200_000,
    )
    return rng.choice(ways) if rng.random() < 0.4 else data


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FILES))
def test_any_file_gives_sound_prompts_or_is_refused(folder: Path, number: int) -> None:
    rng = random.Random(number)
    suffix = rng.choice(list(FORMATS))
    file = folder / f"prompts-{number}{suffix}"
    file.write_bytes(spoilt(FORMATS[suffix](rows_of(rng), rng), rng))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"takes more than {HANGS_S} s"))
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    try:
        prompts = load_prompt_set(PromptSetConfig(path=str(file)))
        for prompt in map(with_pictures, prompts):
            plain = {k: v for k, v in prompt.columns.items() if not isinstance(v, Image.Image)}
            json.dumps([prompt.text, plain], allow_nan=False, ensure_ascii=False).encode()
            assert prompt.text.strip() and not prompt.columns.keys() & set(RESERVED_COLUMNS)
            pictures = [v for v in prompt.columns.values() if isinstance(v, Image.Image)]
            assert all(p.mode == "RGB" and p.width * p.height <= MAX_PIXELS for p in pictures)
        print("taken:", [prompt.text[:40] for prompt in prompts])
    except ImageRLError as error:
        message = str(error)
        print(message)
        assert str(file) in message or "cut.png" in message
        assert "\n" not in message and len(message) < 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
