"""Folders of pictures laid out as the official scorers of public benchmarks read them.

GenEval (arXiv 2310.11513), DPG-Bench (arXiv 2403.05135), ImgEdit-Bench (arXiv 2505.20275) and LongText-Bench
(arXiv 2507.22058). Prompts come from the
benchmark's own files, unchanged; every random number depends on the seed, the prompt's place and the sample, so an
interrupted drawing goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.kept_pictures import refuse_filled
from imagerl.rl.files.grids import save_image
from imagerl.rl.files.metrics import to_json
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import parse_json, read_json, read_picture, read_text
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.types import Prompt, Source

GRID = 4  # pictures that DPG-Bench's scorer cuts out of a grid of two rows


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt of a benchmark."""

    index: int  # its place in the official files, and part of every random seed
    text: str
    name: str  # of its folder or picture
    record: str = ""  # GenEval: its line, as it stands in the file
    source: Path | None = None  # ImgEdit: the picture to edit

    def prompt(self) -> Prompt:
        """Make a `Prompt`. Raises ImageRLError when the picture to edit cannot be read."""
        if self.source is None:
            return Prompt(self.index, self.text)
        return Prompt(self.index, self.text, {"reference": read_picture(self.source, self.name)})


@dataclass(frozen=True, slots=True)
class Layout:
    """The way a benchmark is read and written."""

    read: Callable[
        [Path, Path | None], list[Entry]
    ]  # the official prompts, and the folder of source pictures
    samples: tuple[int, ...]  # pictures a prompt that the scorer takes, the official number first; none: any
    last: Callable[[Entry, int], str]  # the file that is written last: where it is, the entry is done
    write: Callable[[Path, Entry, np.ndarray], None]  # pictures [N, H, W, 3] uint8 into the folder


def read_geneval(file: Path, sources: Path | None) -> list[Entry]:
    """Read evaluation_metadata.jsonl. Raises ImageRLError for a line that the scorer could not use."""
    entries = []
    for line, text in enumerate(_lines(file), 1):
        record = _mapping(
            parse_json(text, f"{file}, line {line}"), ("tag", "include", "prompt"), f"{file}, line {line}"
        )
        entries.append(Entry(line - 1, record["prompt"], f"{line - 1:05d}", text))
    return entries


def write_geneval(folder: Path, entry: Entry, pictures: np.ndarray) -> None:
    """Write `00000/metadata.jsonl` and `00000/samples/0000.png`, ..."""
    write_atomic(folder / entry.name / "metadata.jsonl", entry.record + "\n")
    for number, picture in enumerate(pictures):
        save_image(Image.fromarray(picture), folder / entry.name / "samples" / f"{number:04d}.png")


def read_dpg(folder: Path, sources: Path | None) -> list[Entry]:
    """Read the folder `dpg_bench/prompts`: one text file a prompt, whose name the picture bears."""
    if not folder.is_dir():
        raise ImageRLError(f"{folder} is no folder; give DPG-Bench's dpg_bench/prompts")
    files = sorted(folder.glob("*.txt"))
    texts = [read_text(file).strip() for file in files]
    for file, text in zip(files, texts, strict=True):
        if not text:
            raise ImageRLError(f"{file} is empty; take DPG-Bench's prompts as they are")
    return [Entry(i, text, file.stem) for i, (file, text) in enumerate(zip(files, texts, strict=True))]


def write_dpg(folder: Path, entry: Entry, pictures: np.ndarray) -> None:
    """Write `<name>.png`: the picture, or a seamless grid of 2×2. The scorer cuts squares: raises ImageRLError for
    other pictures."""
    _, height, width, _ = pictures.shape
    if height != width:
        raise ImageRLError(
            f"DPG-Bench's scorer cuts out squares, but the model draws {width}x{height} pixels"
        )
    picture = pictures[0]
    if len(pictures) == GRID:
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures[:2], pictures[2:])])
    save_image(Image.fromarray(picture), folder / f"{entry.name}.png")


def read_imgedit(file: Path, sources: Path | None) -> list[Entry]:
    """Read basic_edit.json or UGE_edit.json: `{key: {id, prompt, ...}}`, `id` a path below the folder of sources."""
    if sources is None:
        raise ImageRLError(
            "ImgEdit edits pictures; give --sources, the folder that holds the benchmark's originals"
        )
    edits = read_json(file)
    if not isinstance(edits, dict):
        raise ImageRLError(
            f"{file} should map keys to edits; give ImgEdit's basic_edit.json or UGE_edit.json"
        )
    entries = []
    for index, (key, value) in enumerate(edits.items()):
        edit = _mapping(value, ("id", "prompt"), f"{file}, key {key}")
        if Path(key).name != key:
            raise ImageRLError(f"{file}: key {key!r} cannot be the name of a picture")
        source = sources / edit["id"]
        if not source.is_file():
            raise ImageRLError(f"{file}, key {key}: there is no picture {source}; correct --sources")
        entries.append(Entry(index, edit["prompt"], key, source=source))
    return entries


def write_imgedit(folder: Path, entry: Entry, pictures: np.ndarray) -> None:
    """Write `<key>.png`."""
    save_image(Image.fromarray(pictures[0]), folder / f"{entry.name}.png")


def read_longtext(file: Path, sources: Path | None) -> list[Entry]:
    """Read text_prompts.jsonl, or text_prompts_zh.jsonl. Raises ImageRLError for a line that the scorer cannot use."""
    entries: dict[str, Entry] = {}
    for line, text in enumerate(_lines(file), 1):
        place = f"{file}, line {line}"
        record = _mapping(parse_json(text, place), ("prompt_id", "prompt", "text"), place)
        number = record["prompt_id"]
        if type(number) is not int or number < 0 or f"{number:04d}" in entries:
            raise ImageRLError(
                f"{place}: prompt_id {number!r} is no number of its own; take the file as it is"
            )
        entries[f"{number:04d}"] = Entry(line - 1, record["prompt"], f"{number:04d}")
    return list(entries.values())


def write_longtext(folder: Path, entry: Entry, pictures: np.ndarray) -> None:
    """Write `0000_1.png`, `0000_2.png`, ..."""
    for number, picture in enumerate(pictures, 1):
        save_image(Image.fromarray(picture), folder / f"{entry.name}_{number}.png")


LAYOUTS: dict[str, Layout] = {
    "geneval": Layout(
        read_geneval, (), lambda entry, samples: f"{entry.name}/samples/{samples - 1:04d}.png", write_geneval
    ),
    "dpg": Layout(read_dpg, (GRID, 1), lambda entry, samples: f"{entry.name}.png", write_dpg),
    "imgedit": Layout(read_imgedit, (1,), lambda entry, samples: f"{entry.name}.png", write_imgedit),
    "longtext": Layout(
        read_longtext, (4,), lambda entry, samples: f"{entry.name}_{samples}.png", write_longtext
    ),
}
GENEVAL_SAMPLES = 4


def entries_of(layout: str, prompts: Path, sources: Path | None) -> list[Entry]:
    """Read the prompts of a benchmark.

    Raises ImageRLError: no such layout or file, no prompts, or one that is not as the benchmark has it."""
    if layout not in LAYOUTS:
        raise ImageRLError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if sources is not None and layout != "imgedit":
        raise ImageRLError(f"--sources are pictures to edit; {layout} has none")
    entries = LAYOUTS[layout].read(prompts, sources)
    if not entries:
        raise ImageRLError(f"{prompts} holds no prompts")
    return entries


def prompts_sha256(entries: Sequence[Entry]) -> str:
    """Hash names and texts in their order: other prompts must not go on in a folder that was begun with these."""
    return hashlib.sha256(json.dumps([(entry.name, entry.text) for entry in entries]).encode()).hexdigest()


def samples_of(layout: str, samples: int | None) -> int:
    """Return the number of pictures a prompt: the official one when none is given. Raises ImageRLError for another than
    the scorer takes."""
    allowed = LAYOUTS[layout].samples or (GENEVAL_SAMPLES,)
    if samples is None:
        return allowed[0]
    if LAYOUTS[layout].samples and samples not in allowed:
        counts = " or ".join(map(str, allowed))
        raise ImageRLError(f"{layout}'s scorer takes {counts} pictures of a prompt, not {samples}")
    return samples


def draw(
    layout: str,
    entries: Sequence[Entry],
    rollout: Source,
    folder: Path,
    samples: int,
    batch_size: int,
    facts: Mapping[str, object],
) -> Iterator[int]:
    """Draw what is missing in `folder`, yielding how many prompts are done. `facts` about the drawing stand in
    `<folder>.json`, beside the folder, in which scorers take every file for a picture.

    Raises ImageRLError when the folder was begun with other facts."""
    _begin(folder, facts)
    written = LAYOUTS[layout]
    missing = [entry for entry in entries if not (folder / written.last(entry, samples)).is_file()]
    done = len(entries) - len(missing)
    yield done
    size = max(1, batch_size // samples)
    for chunk in (missing[start : start + size] for start in range(0, len(missing), size)):
        by_index = {entry.index: entry for entry in chunk}
        prompts = [entry.prompt() for entry in chunk]
        for groups in rollout.generate(prompts, samples, f"benchmark {layout}"):
            for group in groups:
                written.write(folder, by_index[group.prompt.index], group.images)
        done += len(chunk)
        yield done


def _begin(folder: Path, facts: Mapping[str, object]) -> None:
    record = folder.with_name(f"{folder.name}.json")
    told = json.loads(to_json(facts))
    if record.is_file():
        known = validated(dict[str, object], read_json(record), str(record))
        differing = sorted(k for k in told.keys() | known.keys() if told.get(k) != known.get(k))
        if differing:
            raise ImageRLError(
                f"{folder} was begun with another {differing[0]} ({record}); choose another folder, or remove both"
            )
        return
    refuse_filled(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(record, to_json(facts, indent=1) + "\n")


def _lines(file: Path) -> list[str]:
    return [line for line in read_text(file).split("\n") if line.strip()]


def _mapping(value: Any, keys: Sequence[str], place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise ImageRLError(f"{place}: should have {', '.join(keys)}; take the benchmark's file as it is")
    for key in ("prompt", "id"):
        if key in keys and not (isinstance(value[key], str) and value[key].strip()):
            raise ImageRLError(f"{place}: {key!r} should be a text that is not empty")
    return value
