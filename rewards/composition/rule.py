"""Judge what was found in a picture by a prompt's specification: GenEval's format and rule (arXiv 2310.11513),
pure.

A specification is a line of GenEval's metadata: `include` names what must be there (`class`, `count`, and where asked
for `color` and `position`, a relation to an earlier entry), `exclude` how many of a class must not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imagerl.rl.types import ImageRLError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLEARANCE = 0.1  # of the two sizes together: how far centres must lie apart to be beside each other


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a picture."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    confidence: float = 1.0
    colour: str | None = None  # where the detector knows it


@dataclass(frozen=True, slots=True)
class Wanted:
    """One entry of `include`."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None  # a relation, and which entry it is to


@dataclass(frozen=True, slots=True)
class Specification:
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    tag: str = ""

    @property
    def classes(self) -> list[str]:
        """Return every class that must be looked for, once."""
        return list(dict.fromkeys(wanted.name for wanted in (*self.include, *self.exclude)))


Fault = Literal["missing", "colour", "position", "too many"]
NameColours = Callable[[Sequence[Found], str], Sequence[str]]  # of objects of a class


def specification(include: object, exclude: object = None, tag: object = None) -> Specification:
    """Read the columns of a prompt. Raises ImageRLError in one line unless they are in GenEval's format."""
    wanted = tuple(
        _wanted(entry, index, "include") for index, entry in enumerate(_entries(include, "include"))
    )
    if not wanted:
        raise _mistake("include", include, "a list with at least one entry")
    unwanted = tuple(_wanted(entry, 0, "exclude") for entry in _entries(exclude or [], "exclude"))
    return Specification(wanted, unwanted, str(tag or ""))


def _entries(value: object, column: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _mistake(column, value, "a list of entries")
    return value


def _wanted(entry: object, index: int, column: str) -> Wanted:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        raise _mistake(column, entry, "entries with a class, such as {class: bench, count: 1}")
    count, position = entry.get("count", 1), entry.get("position")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise _mistake(column, entry, "a count of 1 or more")
    if position is not None:
        known = isinstance(position, list | tuple) and len(position) == 2 and position[0] in RELATIONS
        if not known or position[1] not in range(index):
            raise _mistake(
                column,
                entry,
                f"a position of [relation, number of an earlier entry], one of {', '.join(RELATIONS)}",
            )
        position = (str(position[0]), int(position[1]))
    return Wanted(entry["class"], count, entry.get("color"), position)


def _mistake(column: str, value: object, wanted: str) -> ImageRLError:
    return ImageRLError(f"reward 'composition': column {column} must hold {wanted}, not {str(value)[:80]}")


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Say how a box lies to another: at most one of left and right and one of above and below; none where centres are
    too near for their sizes."""
    a, b = np.asarray(box, dtype=np.float64).reshape(2, 2), np.asarray(other, dtype=np.float64).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - CLEARANCE * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    told = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in told.items() if holds}


def faults(
    found: Mapping[str, Sequence[Found]], asked: Specification, name_colours: NameColours
) -> list[Fault | None]:
    """Say what is wrong with each entry of `include`, then of `exclude`; None where it is as asked.

    Only the most confident objects count, as many as are asked for. All of them must have the colour, and all must lie
    as asked to all of the entry that `position` names; nothing lies beside an entry that failed."""
    told: list[Fault | None] = []
    matched: list[Sequence[Found] | None] = []
    for wanted in asked.include:
        objects = _most_confident(found.get(wanted.name, ()))[: wanted.count]
        fault: Fault | None = None
        if len(objects) < wanted.count:
            fault = "missing"
        elif wanted.colour is not None and list(name_colours(objects, wanted.name)).count(
            wanted.colour
        ) < len(objects):
            fault = "colour"
        elif wanted.position is not None and not _all_lie(
            objects, matched[wanted.position[1]], wanted.position[0]
        ):
            fault = "position"
        told.append(fault)
        matched.append(None if fault else objects)
    for unwanted in asked.exclude:
        told.append("too many" if len(found.get(unwanted.name, ())) >= unwanted.count else None)
    return told


def nothing_else(found: Mapping[str, Sequence[Found]], asked: Specification) -> bool:
    """Tell whether no class that was looked for has more objects than asked for."""
    counts = dict.fromkeys(found, 0)
    for wanted in asked.include:
        counts[wanted.name] += wanted.count
    return all(len(objects) <= counts[name] for name, objects in found.items())


def _most_confident(objects: Sequence[Found]) -> list[Found]:
    return sorted(objects, key=lambda found: -found.confidence)


def _all_lie(objects: Sequence[Found], targets: Sequence[Found] | None, relation: str) -> bool:
    return targets is not None and all(
        relation in relations(found.box, target.box) for found in objects for target in targets
    )


def without_overlaps(objects: Sequence[Found], max_overlap: float) -> list[Found]:
    """Drop objects that overlap a kept, more confident one by this intersection over union or more."""
    kept: list[Found] = []
    for candidate in _most_confident(objects):
        if all(overlap(candidate.box, other.box) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes as GenEval has it: corners are pixels that belong to the box,
    so that each side is longer by one than they lie apart, and boxes that leave less than a pixel between them
    overlap."""
    both = _pixels((*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])))
    union = _pixels(a) + _pixels(b) - both
    return both / union if union > 0 else 0.0


def _pixels(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)
