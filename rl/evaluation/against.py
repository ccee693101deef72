"""Two evaluations of the same prompts and random numbers, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rl.stats import compare, verdict

KEPT = ("model", "model_sha256", "temperature", "guidance", "flow_steps", "versions")


def compared(other: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an evaluation's JSON says `against` the document of another one: who that is, and of each metric both
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
