"""The README's result table and picture: `python docs/results.py runs/results/*` prints the one and draws the other,
the first run's fixed prompts before and after, as docs/before_after.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.evaluation.stats import Interval, number, span
from imagerl.rl.files.metrics import read_metrics

COLUMNS = (
    "run",
    "exact match",
    "difference (95 %)",
    "OCR reward",
    "ink right",
    "background right",
    "KL",
)


def row(run: Path) -> list[str]:
    """One run as table cells; before → after of each held-out metric."""
    metrics: dict[str, Any] = json.loads((run / "eval" / "comparison.json").read_text())["metrics"]
    steps = [record for record in read_metrics(run) if "reward/mean" in record]

    def percent(name: str) -> str:
        return f"{100 * metrics[name]['before']:.1f} → {100 * metrics[name]['after']:.1f} %"

    gap = Interval.read(metrics["exact_match"]["difference"])
    return [
        run.name,
        percent("exact_match"),
        f"{number(gap.mean, True, True)} ({span(gap, True, True)})",
        f"{metrics['ocr']['before']:.3f} → {metrics['ocr']['after']:.3f}",
        percent("colours/ink"),
        percent("colours/background"),
        f"{steps[-1]['kl/k3']:.4f}",
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
