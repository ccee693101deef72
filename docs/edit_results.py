"""The table of docs/editing.md: `python docs/edit_results.py runs/edits/seed-*`. The last row is the mean of
all runs, with an interval for other seeds and prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from imagerl.rl.evaluation.stats import crossed_interval, mean_interval, number, paired_scores, span

SHOWN = {"success": 1, "exact_match": 1, "kept_error": 4, "kept_similarity": 3}  # metric: digits
RATES = ("success", "exact_match")


def values(run: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """[P] before and [P] after, of the same prompts; NaN where there is none."""
    files = sorted((run / "eval").glob("edit_step_*.json"))
    first, last = (json.loads(file.read_text())["per_prompt"] for file in (files[0], files[-1]))
    assert [row["index"] for row in first] == [row["index"] for row in last]
    before, after = (np.array([row[metric] for row in rows], dtype=np.float64) for rows in (first, last))
    return before, after


def cell(metric: str, before: np.ndarray, after: np.ndarray) -> str:
    """Of runs × prompts: the means, and the paired difference with its interval."""
    digits, rate = SHOWN[metric], metric in RATES
    gaps = paired_scores(after, before)
    gap = crossed_interval(gaps) if len(gaps) > 1 else mean_interval(gaps[0])
    ends = " → ".join(number(float(np.nanmean(scores)), rate, digits=digits) for scores in (before, after))
    return f"{ends}, {number(gap.mean, rate, True, digits)} ({span(gap, rate, True, digits)})"


def table(runs: list[Path]) -> str:
    rows = [["run", *SHOWN], ["---"] * (1 + len(SHOWN))]
    groups = [[run] for run in runs] + ([runs] if len(runs) > 1 else [])
    for group in groups:
        pairs = {metric: [values(run, metric) for run in group] for metric in SHOWN}
        stacked = {
            metric: [np.stack(side) for side in zip(*pair, strict=True)] for metric, pair in pairs.items()
        }
        cells = [cell(metric, *stacked[metric]) for metric in SHOWN]
        rows.append([group[0].name if len(group) == 1 else f"mean of {len(group)}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))
