"""Two evaluations of the same prompts and random numbers, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rl.stats import compare, verdict

DRAWN = ("temperature", "guidance", "flow_steps")
KEPT = ("model", "model_sha256", *DRAWN, "versions")


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


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How the pictures of two evaluations were drawn, where that is not alike: "guidance 1.0 and 2.0"."""
    known = [key for key in DRAWN if key in one and key in other]
    return [f"{key} {one[key]} and {other[key]}" for key in known if one[key] != other[key]]
