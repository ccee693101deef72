"""Models judged each at its best sampling temperature, chosen on other prompts than those it is judged on.

A colder model draws better pictures without having learned anything, so a gain at temperature 1 alone may be one that
lowering the temperature gives too. The best of several temperatures on the prompts that it was chosen on is too good;
here each half of the prompts is judged at what was best on the other half, so that no prompt chooses for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagerl.rl.evaluation.stats import HEADLINES, Row, by_prompt, change, compare, headline, number

Rows = Sequence[Row]
AtTemperatures = Mapping[float, Rows]  # the same prompts, at each temperature


def at_best(tried: AtTemperatures, metric: str) -> tuple[list[Row], tuple[float, float]]:
    """Return every prompt's row at the temperature that was best on the half of the prompts that it is not in, and
    these two temperatures. Of equally good ones the highest is taken."""
    order = sorted({row["index"] for rows in tried.values() for row in rows})
    halves = [set(order[::2]), set(order[1::2])]
    rows: list[Row] = []
    chosen = []
    for own, other in zip(halves, reversed(halves), strict=True):
        best = max(sorted(tried, reverse=True), key=lambda t: _mean(tried[t], metric, other))
        chosen.append(best)
        rows += [row for row in tried[best] if row["index"] in own]
    return sorted(rows, key=lambda row: row["index"]), (chosen[0], chosen[1])


def compare_at_best(before: AtTemperatures, after: AtTemperatures) -> dict[str, Any] | None:
    """Return what eval/comparison.json says of both models at their best temperatures; None where but one was tried."""
    rows = next(iter(before.values()), [])
    metric = headline(name for row in rows for name in row if name not in ("index", "prompt"))
    if len(before) < 2 or not after or metric is None:
        return None
    (old, old_best), (new, new_best) = at_best(before, metric), at_best(after, metric)
    return {
        "metric": metric,
        "tried": sorted(before, reverse=True),
        "chosen": {"before": old_best, "after": new_best},
        "metrics": compare(old, new),
        "per_prompt": {"before": old, "after": new},
    }


def told_at_best(best: Mapping[str, Any] | None) -> str | None:
    """Return the line that a run ends with about what `compare_at_best` found."""
    if best is None or best["metric"] not in best["metrics"]:
        return None
    name, chosen = best["metric"], best["chosen"]
    result, rate = best["metrics"][name], name in HEADLINES
    old, new = (number(result[when], rate) for when in ("before", "after"))
    return (
        f"held-out {name} at each model's best temperature ({words(chosen['before'])} before, {words(chosen['after'])} "
        f"after, chosen on the other prompts): {old} → {new} ({change(result['difference'], rate)})"
    )


def words(chosen: Sequence[float]) -> str:
    """Write the temperatures of both halves, one where they are the same."""
    return " and ".join(f"{value:g}" for value in dict.fromkeys(chosen))


def _mean(rows: Rows, metric: str, indices: set[int]) -> float:
    values = by_prompt([row for row in rows if row["index"] in indices], metric).values()
    return sum(values) / len(values) if values else float("-inf")
