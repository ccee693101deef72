"""The README's result table and picture: `python docs/results.py runs/results/*` prints the one and draws the other,
the first run's fixed prompts before and after, as docs/before_after.png."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.evaluation.stats import Interval, number, span

COLUMNS = (
    "run",
    "exact match at T = 1",
    "difference (95 %)",
    "at each model's best T",
    "difference (95 %)",
    "ink right",
    "background right",
    "KL",
)
EXACT = "exact_match"


def change(result: Mapping[str, Any]) -> list[str]:
    """A metric before → after, and the difference with its interval."""
    gap = Interval.read(result["difference"])
    return [percent(result), f"{number(gap.mean, True, True)} ({span(gap, True, True)})"]


def percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['before']:.1f} → {100 * result['after']:.1f} %"


def row(run: Path) -> list[str]:
    """One run as table cells."""
    comparison = json.loads((run / "eval" / "comparison.json").read_text())
    metrics, best = comparison["metrics"], comparison["best_temperature"]
    coldest = [
        " and ".join(f"{t:g}" for t in dict.fromkeys(best["chosen"][when])) for when in ("before", "after")
    ]
    level, gain = change(best["metrics"][EXACT])
    return [
        run.name,
        *change(metrics[EXACT]),
        f"{level} (T = {coldest[0]}; {coldest[1]})",
        gain,
        percent(metrics["colours/ink"]),
        percent(metrics["colours/background"]),
        f"{metrics['kl']['after']:.3f}",
    ]


def table(runs: list[Path]) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(run) for run in runs)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def picture(run: Path) -> Image.Image:
    """A run's first and last grid side by side."""
    grids = [Image.open(path) for path in sorted((run / "samples").glob("step_*.png"))]
    first, last = grids[0], grids[-1]
    gap, title = 24, 30
    sheet = Image.new("RGB", (first.width + gap + last.width, title + first.height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, grid, text in ((0, first, "before"), (first.width + gap, last, "after")):
        draw.text((x + 8, 6), text, fill="black", font=ImageFont.load_default(18))
        sheet.paste(grid, (x, title))
    return sheet


if __name__ == "__main__":
    finished = [Path(argument) for argument in sys.argv[1:]]
    print(table(finished))
    picture(finished[0]).save(Path(__file__).parent / "before_after.png", optimize=True)
