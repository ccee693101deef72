"""The README's result table from finished runs: `python docs/results.py runs/results/*`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rl.metrics import read_metrics

COLUMNS = (
    "run",
    "exact match",
    "difference (95 %)",
    "OCR reward",
    "ink right",
    "background right",
    "KL",
    "minutes",
)


def row(run: Path) -> list[str]:
    """One run as table cells; before → after of each held-out metric."""
    metrics: dict[str, Any] = json.loads((run / "eval" / "comparison.json").read_text())["metrics"]
    steps = [record for record in read_metrics(run) if "reward/mean" in record]

    def percent(name: str) -> str:
        return f"{100 * metrics[name]['before']:.1f} → {100 * metrics[name]['after']:.1f} %"

    gap = metrics["exact_match"]["difference"]
    return [
        run.name,
        percent("exact_match"),
        f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})",
        f"{metrics['reward']['before']:.3f} → {metrics['reward']['after']:.3f}",
        percent("colours/ink"),
        percent("colours/background"),
        f"{steps[-1]['kl/k3']:.4f}",
        f"{sum(record['time/step_s'] for record in steps) / 60:.1f}",
    ]


def table(runs: list[Path]) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(run) for run in runs)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))
