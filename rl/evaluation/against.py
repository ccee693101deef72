"""Evaluations that were written earlier, and two of them of the same prompts and random numbers, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from imagerl.rl.evaluation.stats import Row, compare, verdict
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import read_json

DRAWN = ("temperature", "guidance", "flow_steps")
KEPT = ("model", "model_sha256", *DRAWN, "versions")


class StoredInterval(BaseModel):
    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = Field(None, ge=0)


class StoredRow(BaseModel):
    """One prompt, or one sample of it; beside these two the values of the metrics, and words."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | str | None]

    index: int = Field(0, ge=0)
    prompt: str = ""


class StoredEvaluation(BaseModel):
    """The part of an evaluation's JSON that is read back."""

    suite: str = ""
    n: int | None = Field(None, ge=0)
    metrics: dict[str, StoredInterval] = Field(default_factory=dict)
    per_prompt: list[StoredRow] = Field(default_factory=list)


class StoredDifference(BaseModel):
    difference: StoredInterval | None = None


class StoredComparison(BaseModel):
    """The part of a run's eval/comparison.json that is read back."""

    suite: str = ""
    before_step: int
    after_step: int
    metrics: dict[str, StoredDifference]


def read_evaluation(path: str | Path, comparison: bool = False) -> dict[str, object]:
    """Read the JSON of an evaluation, or of a run's comparison of two. Raises ImageRLError when it is none."""
    document: dict[str, object] = read_json(path)
    validated(StoredComparison if comparison else StoredEvaluation, document, str(path))
    return document


def compared(other: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, object]:
    """Return an evaluation's `against`, from the document of another one: who that is, and of each metric both
    means, the paired difference (this one minus the other) with its interval, and a verdict in words."""
    theirs = other["per_prompt"]
    metrics = {
        name: {
            "model": row["after"],
            "against": row["before"],
            "difference": asdict(row["difference"]),
            "verdict": verdict(row["difference"]),
        }
        for name, row in compare(theirs, rows).items()
    }
    return {key: other[key] for key in KEPT if key in other} | {"metrics": metrics}


def differing_settings(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """List the settings in which two evaluations drew unlike pictures: "guidance 1.0 and 2.0"."""
    known = [key for key in DRAWN if key in one and key in other]
    return [f"{key} {one[key]} and {other[key]}" for key in known if one[key] != other[key]]
