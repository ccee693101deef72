"""Prompts: sets from files or by name, and the sampler that draws them for training."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.config.recipe import SHIPPED
from imagerl.rl.data.prompt_pictures import picture_hash, picture_paths
from imagerl.rl.data.tables import HUB, is_table, read_table
from imagerl.rl.data.tiny.edits import edit_set
from imagerl.rl.data.tiny.shapes import shape_set
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import parse_json, read_text, require_plain
from imagerl.rl.files.yaml_text import parse_yaml_lines
from imagerl.rl.types import Prompt

if TYPE_CHECKING:
    from imagerl.rl.config.train import PromptSetConfig

RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "images",
    "groups",
    "progress",
    "policy",
    "self",
)  # what rewards get beside the columns, or are themselves
LINES_SHOWN = 20  # of the rows that a held-out set shares with the training set
# What public prompt and edit sets call our columns, in any letter case; the first of these that a set has is taken
# where it has no column of our name.
PROMPT, REFERENCE = "prompt", "reference"
SYNONYMS = {
    PROMPT: ("instruction", "edit_instruction", "edit_prompt", "edit", "caption", "text", "prompts"),
    REFERENCE: (
        *(
            "source_image",
            "input_image",
            "original_image",
            "reference_image",
            "source_img",
            "input_img",
            "src_img",
        ),
        *("image", "images", "img", "image_path"),
    ),
}
Row = tuple[int, Any]  # line number, and a mapping of columns or a bare prompt
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in a fixed order; a text that stands there twice is two prompts. All have the same columns."""

    source: str  # for messages: a path or name/split
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def columns(self) -> list[str]:
        return list(self.prompts[0].columns)


NAMED_SETS: dict[str, Callable[[str, int | None, int], list[Prompt]]] = {
    "tiny_edits": edit_set,
    "tiny_shapes": lambda split, size, seed: shape_set(split, size),
    "tiny_text_edits": partial(edit_set, parts=("text",)),
    "tiny_world": prompt_set,
}
SHIPPED_FILES = ("ocr_signs", "edits")  # in recipes/prompts


def load_prompt_set(config: PromptSetConfig) -> PromptSet:
    """Load the prompts that a recipe asks for. A prompt's index is its place in the file, blank lines aside.

    Raises:
        ImageRLError: no such set or file, a row that is no prompt, too few prompts.
    """
    path = config.path
    if config.name in SHIPPED_FILES:
        path = str(SHIPPED / "prompts" / f"{config.name}_{config.split}.jsonl")
    if path is None:
        if config.name not in NAMED_SETS:
            known = ", ".join((*NAMED_SETS, *SHIPPED_FILES))
            raise ImageRLError(f'no prompt set is named "{config.name}"; there is: {known}')
        source = f"{config.name}/{config.split}"
        prompts = NAMED_SETS[config.name](str(config.split), config.size, config.seed)
        lines = [prompt.index + 1 for prompt in prompts]
        prompts = [replace(p, source=source, line=n) for p, n in zip(prompts, lines, strict=True)]
    else:
        source = path
        rows = _renamed(_read_rows(source, config), config.columns, source)
        prompts = _to_prompts(rows, config.column, source)
    if config.size is not None and config.size > len(prompts):
        raise ImageRLError(
            f"{source} has {len(prompts)} prompts, fewer than its size in the recipe, {config.size}"
        )
    return PromptSet(source, tuple(prompts[: config.size]))


def inline_prompts(rows: Sequence[str | dict[str, object]], source: str) -> PromptSet:
    """Read prompts that are written out in another file, `source`: texts, or mappings with a `prompt` in each. Lines in
    messages are counted within the list. Raises ImageRLError like `load_prompt_set`."""
    return PromptSet(source, tuple(_to_prompts(list(enumerate(rows, 1)), PROMPT, source)))


def refuse_overlap(train: PromptSet, heldout: PromptSet, wanted: Callable[[object, str], str]) -> None:
    """Refuse held-out prompts that were trained on, or whose targets were: their results mean nothing.

    `wanted` says what the rewards compare a picture with, "" for nothing, given the column `target` and the text; it
    is `rewards.ocr.reward.wanted_text`. Prompts are the same but for case and white space, edits if their pictures
    are too.

    Raises:
        ImageRLError: with the rows, when a prompt or a target is in both sets.
    """

    def text(prompt: Prompt) -> str:
        return " ".join(prompt.text.casefold().split())

    common = {text(prompt) for prompt in train} & {text(prompt) for prompt in heldout}

    def whole(prompt: Prompt) -> str:
        """Identify a prompt. Pictures are read only where instructions are alike: they may be many."""
        return text(prompt) + picture_hash(prompt) if text(prompt) in common else ""

    def target(prompt: Prompt) -> str:
        return wanted(prompt.columns.get("target"), prompt.text)

    for what, value_of in (("prompt", whole), ("target", target)):
        # Reversed, so that of equal prompts the message names the first line.
        trained = {value: prompt for prompt in reversed(train.prompts) if (value := value_of(prompt))}
        shared = [(prompt, trained[value]) for prompt in heldout if (value := value_of(prompt)) in trained]
        if shared:
            first, known = shared[0]
            lines = ", ".join(str(prompt.line) for prompt, _ in shared[:LINES_SHOWN])
            raise ImageRLError(
                f"{len(shared)} {what}s of data.heldout ({heldout.source}) are also in data.train ({train.source}), "
                f'such as "{target(first) if what == "target" else first.text}" of line {first.line} in line '
                f"{known.line}; remove them from one of the two: held-out lines {lines}"
                f"{', ...' if len(shared) > LINES_SHOWN else ''}"
            )


def _read_rows(source: str, config: PromptSetConfig) -> list[Row]:
    if is_table(source):
        return list(read_table(source, config.split, config.subset, config.size))
    suffix = Path(source).suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".yaml": _yaml, ".yml": _yaml}
    if suffix not in readers:
        raise ImageRLError(
            f'cannot tell the format of "{source}"; name it .jsonl, .json, .csv, .txt, .yaml or .parquet, or write '
            f"{HUB}owner/name for a data set of the hub"
        )
    return list(readers[suffix](read_text(source), source))


def _jsonl(text: str, source: str) -> Iterator[Row]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield line, parse_json(content, f"{source}, line {line}")


def _json(text: str, source: str) -> Iterator[Row]:
    rows = parse_json(text, source)
    if not isinstance(rows, list):
        raise ImageRLError(f"{source}: should be a list of prompts, or of mappings with a prompt in each")
    return iter(enumerate(rows, 1))


def _renamed(rows: Sequence[Row], columns: Mapping[str, str], source: str) -> list[Row]:
    """Call columns as a recipe says, ours: theirs. Raises ImageRLError for one that no row has."""
    known = {name for _, row in rows if isinstance(row, dict) for name in row}
    for ours, theirs in columns.items():
        if theirs not in known:
            raise ImageRLError(f'{source}: no column "{theirs}" to call {ours}, only {_shown(sorted(known))}')
        if ours in known - set(columns.values()):
            raise ImageRLError(f'{source}: has a column "{ours}" already; rename that one too')
    taken = set(columns.values())
    return [
        (
            line,
            {name: value for name, value in row.items() if name not in taken}
            | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            if isinstance(row, dict)
            else row,
        )
        for line, row in rows
    ]


def _csv(text: str, source: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if twice := [name for name in header if header.count(name) > 1]:
            raise ImageRLError(f'{source}: the header names the column "{twice[0]}" twice; rename one')
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                raise ImageRLError(f"{source}, line {reader.line_num}: not the {wanted} fields of the header")
            yield reader.line_num, row
    except csv.Error as error:
        raise ImageRLError(f"{source}, line {reader.line_num}: not CSV ({error})") from None


def _txt(text: str, source: str) -> Iterator[Row]:
    return ((line, content.strip()) for line, content in enumerate(text.split("\n"), 1) if content.strip())


def _yaml(text: str, source: str) -> Iterator[Row]:
    rows, lines = parse_yaml_lines(text, source)
    if not isinstance(rows, list):
        raise ImageRLError(f"{source}: should be a list of prompts, or of mappings with a prompt in each")
    return iter(zip(lines, rows, strict=True))


def _to_prompts(rows: Sequence[Row], column: str, source: str) -> list[Prompt]:
    """Make prompts of rows. Columns that a row lacks are None, so that rewards get lists of equal length."""
    if not rows:
        raise ImageRLError(f"{source} holds no prompts")
    mappings: list[tuple[str, dict[str, Any]]] = []
    for line, row in rows:
        place = f"{source}, line {line}"
        mapping = {column: row} if isinstance(row, str) else row
        if not isinstance(mapping, dict):
            raise ImageRLError(f"{place}: should be a mapping of columns, or a prompt")
        require_plain({name: value for name, value in mapping.items() if not isinstance(value, bytes)}, place)
        mappings.append((place, mapping))
    names = list(dict.fromkeys(name for _, mapping in mappings for name in mapping))
    column, reference = _taken(names, column, source)
    for place, mapping in mappings:
        if column not in mapping:
            raise ImageRLError(
                f'{place}: no column "{column}", only {_shown(mapping)}; '
                "add it, or name the right one in the prompt set's `column`"
            )
        if not isinstance(mapping[column], str) or not mapping[column].strip():
            raise ImageRLError(f'{place}: "{column}" should be a text that is not empty')
    names = [REFERENCE if name == reference else name for name in names if name != column]
    for name in RESERVED_COLUMNS:
        if name in names:
            place = next(place for place, mapping in mappings if name in mapping)
            raise ImageRLError(f'{place}: "{name}" is what rewards get from us; rename the column')
    prompts = []
    for index, (place, mapping) in enumerate(mappings):
        columns = {name: mapping.get(reference if name == REFERENCE else name) for name in names}
        if isinstance(given := columns.get(REFERENCE), list):
            if len(given) > 1:
                raise ImageRLError(
                    f'{place}: "{reference}" names {len(given)} pictures; an edit starts from one'
                )
            columns[REFERENCE] = given[0] if given else None
        columns = picture_paths(columns, Path(source).parent, place)
        prompts.append(Prompt(index, mapping[column].strip(), columns, source, rows[index][0]))
    return prompts


def _taken(names: Sequence[str], column: str, source: str) -> tuple[str, str]:
    """Find the columns of the prompt and of the picture to edit, and a word about it where they have other names."""

    def of(ours: str) -> str:
        theirs = {name.lower(): name for name in reversed(names)}
        wanted = () if ours in names else (ours, *SYNONYMS[ours])
        return next((theirs[name] for name in wanted if name in theirs), ours)

    prompt = of(PROMPT) if column == PROMPT else column
    reference = of(REFERENCE)
    renamed = [(prompt, column, "as the prompt"), (reference, REFERENCE, "as the picture to edit")]
    said = [f'"{name}" {what}' for name, usual, what in renamed if name != usual]
    if said:
        _logger.warning("%s: took the column %s", source, " and ".join(said))
    return prompt, reference


def _shown(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 200 else text[:197] + "..."
