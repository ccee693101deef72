"""Set how rewards enter the total: weights that may change over the run, and gates. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from imagerl.rl.types import ImageRLError

Weight = float | Mapping[int, float]
Half = Literal["tokens", "flow", "both"]


@dataclass(frozen=True, slots=True)
class Gate:
    """A reward counts only where another one passes. `by` is "<reward>" or "<reward>/<part>"."""

    by: str
    threshold: float
    at_least: bool = True  # else: at most

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> Gate:
        """Read `{by, at_least | at_most}`; a None stands for an absent key."""
        bounds = [name for name in ("at_least", "at_most") if entry.get(name) is not None]
        if not entry.get("by") or len(bounds) != 1:
            raise ImageRLError(f"a gate needs by and one of at_least and at_most, got {dict(entry)}")
        return cls(str(entry["by"]), float(entry[bounds[0]]), bounds[0] == "at_least")

    def opening(self, values: np.ndarray) -> np.ndarray:
        """Return 1.0 where a value [B] passes, 0.0 where it does not, NaN where it is missing."""
        passes = values >= self.threshold if self.at_least else values <= self.threshold
        return np.where(np.isnan(values), np.nan, passes.astype(np.float64))


@dataclass(frozen=True, slots=True)
class Mix:
    """The way in which one reward enters the total."""

    label: str
    weight: Weight = 1.0
    gate: Gate | None = None
    half: Half = "both"  # of the generator, which it teaches


def weight_at(weight: Weight, step: int) -> float:
    """Return a weight at a step counted from 0. A schedule {step: weight} is linear between its steps and
    constant before and after them."""
    if not isinstance(weight, Mapping):
        return float(weight)
    steps = sorted(weight)
    return float(np.interp(step, steps, [weight[known] for known in steps]))
