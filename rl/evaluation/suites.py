"""Evaluation suites: which prompts are drawn, and which rewards measure the pictures. Some by name, others from
YAML files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field, model_validator

from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe
from imagerl.rl.config.rewards import RewardSpec, source_of
from imagerl.rl.config.train import PromptSetConfig
from imagerl.rl.data.tiny import edits, shapes, world
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt

HELDOUT = 256  # prompts of a named suite, unless told otherwise
RECOGNISE = {"name": "ocr", "mode": "recognise"}  # the tiny world shows one line of text


@dataclass(frozen=True, slots=True)
class Suite:
    """The subject of one evaluation. `rewards` and `gold` are entries as in a recipe; gold ones are never trained on,
    and told apart in the results. Without rewards the prompts are questions about pictures."""

    name: str
    prompts: Callable[[int | None], list[Prompt]]  # the first n, all when None
    rewards: Sequence[Mapping[str, Any]] = ()
    gold: Sequence[Mapping[str, Any]] = ()
    truth: Callable[[Prompt], Image.Image] | None = None  # a perfect picture of a prompt
    model: str = "tiny"  # measured when no other is named
    size: int | None = HELDOUT  # prompts when no number is given; None: all

    @property
    def reads(self) -> bool:
        """Tell whether the model answers questions instead of drawing."""
        return not self.rewards


class SuiteFile(RecipeModel):
    """A suite of one's own."""

    name: str | None = Field(None, min_length=1, description="what results call it; null: the file's name")
    prompts: PromptSetConfig | list[str | dict[str, object]] = Field(
        description="a prompt set as in a recipe's data, or a list of prompts"
    )
    rewards: list[RewardSpec] = Field(min_length=1, description="what is measured; weights give the total")
    gold: list[RewardSpec] = Field(default_factory=list, description="measured beside it, in no total")

    @model_validator(mode="after")
    def _labels(self) -> SuiteFile:
        labels = [spec.label for spec in (*self.rewards, *self.gold)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f'two rewards are called "{label}"; results could not tell them apart')
        for index, spec in enumerate((*self.rewards, *self.gold)):
            if spec.scheduled:
                raise ValueError(f'"{spec.label}" has a schedule; an evaluation has no steps, give a number')
            if spec.gate and index >= len(self.rewards):
                raise ValueError(f'gold metric "{spec.label}" is in no total; remove its gate')
            if spec.gate and spec.gate.by.partition("/")[0] not in labels[: len(self.rewards)]:
                raise ValueError(f'the gate of "{spec.label}" asks for "{spec.gate.by}", which is no reward')
        return self


def _ideal(prompt: Prompt) -> Image.Image:
    picture: Image.Image = prompt.columns["ideal"]
    return picture


_world = partial(world.prompt_set, "heldout")
# A suite is one row.
SUITES: dict[str, Suite] = {
    "clip": Suite("clip", _world, [{"name": "clip", "model": "tiny_clip"}], truth=world.truth),
    "composition": Suite(
        "composition",
        partial(shapes.shape_set, "heldout"),
        [{"name": "composition", "detector": "shapes"}],
        truth=shapes.truth,
        model="tiny_shapes",
    ),
    "edit": Suite(
        "edit",
        partial(edits.edit_set, "heldout"),
        [{"name": "edit", "mode": "recognise"}],
        truth=_ideal,
        model="tiny_edit",
    ),
    "ocr": Suite("ocr", _world, [RECOGNISE], [{"name": "colours"}], truth=world.truth),
    "understanding": Suite("understanding", partial(edits.question_set, "heldout"), model="tiny_edit"),
}


def find_suite(name: str) -> Suite:
    """Find a suite by name, or from a YAML file.

    Raises ImageRLError: no such suite or file, or a mistake in the file, in one line."""
    if name in SUITES:
        return SUITES[name]
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return load_suite(name)
    known = ", ".join(sorted(SUITES))
    raise ImageRLError(f"no suite is named {name!r}; there is: {known} (your own: a file such as suite.yaml)")


def load_suite(path: str) -> Suite:
    """Load a suite from a file of the schema `SuiteFile`. Prompts are read when they are asked for.

    Raises ImageRLError with one line on a mistake."""
    file = load_yaml_recipe(SuiteFile, path)
    name = file.name or Path(path).stem
    named = None if isinstance(file.prompts, list) else file.prompts.name

    def prompts(size: int | None) -> list[Prompt]:
        from imagerl.rl.data.prompt_sets import inline_prompts, load_prompt_set

        if isinstance(file.prompts, PromptSetConfig):
            drawn = load_prompt_set(file.prompts)
        else:
            drawn = inline_prompts(file.prompts, path)
        if size is not None and size > len(drawn):
            raise ImageRLError(f"{drawn.source} has {len(drawn)} prompts, not {size}; ask for fewer")
        return list(drawn)[:size]

    def truth(prompt: Prompt) -> Image.Image:
        if named == "tiny_world":
            return world.truth(prompt)
        if prompt.columns.get("ideal") is None:
            raise ImageRLError(
                f'suite {name!r} does not say what a perfect picture of "{prompt.text}" is: add a column `ideal`'
            )
        return _ideal(prompt)

    return Suite(
        name,
        prompts,
        [spec.model_dump() for spec in file.rewards],
        [spec.model_dump() for spec in file.gold],
        truth,
        size=None,
    )


def fingerprint(suite: Suite, prompts: Sequence[Prompt]) -> str:
    """Return SHA-256 of what is asked and how it is judged: prompts with their columns and pictures, reward entries,
    and the files of one's own rewards. Equal fingerprints mean comparable results."""
    entries = [*suite.rewards, *suite.gold]
    files = {
        entry["import_path"]: _file_hash(entry["import_path"])
        for entry in entries
        if entry.get("import_path")
    }
    asked = [[prompt.index, prompt.text, prompt.columns] for prompt in prompts]
    content = {"rewards": list(suite.rewards), "gold": list(suite.gold), "files": files, "prompts": asked}
    text = json.dumps(content, sort_keys=True, default=_told)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(value: object) -> object:
    """Replace a value that JSON does not hold: pictures by their pixels, their files by the bytes, functions by their
    source."""
    if callable(value):
        return source_of(value)
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()
    if hasattr(value, "tobytes"):
        size = getattr(value, "size", None)
        return [str(getattr(value, "mode", "")), str(size), hashlib.sha256(value.tobytes()).hexdigest()]
    return dict(value) if isinstance(value, Mapping) else str(value)


def _file_hash(import_path: str) -> str | None:
    file = Path(import_path.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
