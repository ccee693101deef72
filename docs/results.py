"""The README's result table and picture: `python docs/results.py runs/results/*` prints the one and draws the other,
the first run's fixed prompts before and after, as docs/before_after.png. Runs of
the composition recipe have a table by kind of prompt, too, and docs/composition.png."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.evaluation.stats import Interval, number, span

# By suite: the metric that the run is about, and what else stands in a row of its table.
HEADLINE = {"ocr": "exact_match", "composition": "composition"}
BESIDE = {
    "ocr": {"ink right": "colours/ink", "background right": "colours/background"},
    "composition": {"exact": "exact"},
}


def change(result: Mapping[str, Any]) -> list[str]:
    """A metric before → after, and the difference with its interval."""
    gap = Interval.read(result["difference"])
    return [percent(result), f"{number(gap.mean, True, True)} ({span(gap, True, True)})"]


def percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['before']:.1f} → {100 * result['after']:.1f} %"


def row(run: Path) -> dict[str, str]:
    """One run as table cells, by column."""
    comparison = json.loads((run / "eval" / "comparison.json").read_text())
    metrics, best, suite = comparison["metrics"], comparison["best_temperature"], comparison["suite"]
    coldest = [
        " and ".join(f"{t:g}" for t in dict.fromkeys(best["chosen"][when])) for when in ("before", "after")
    ]
    level, gain = change(metrics[HEADLINE[suite]])
    best_level, best_gain = change(best["metrics"][HEADLINE[suite]])
    return {
        "run": run.name,
        "right at T = 1": level,
        "difference (95 %)": gain,
        "at each model's best T": f"{best_level} (T = {coldest[0]}; {coldest[1]})",
        "its difference (95 %)": best_gain,
        **{column: percent(metrics[name]) for column, name in BESIDE[suite].items()},
        "KL": f"{metrics['kl']['after']:.3f}",
    }


def categories(runs: list[Path]) -> list[dict[str, str]]:
    """Return a row for each kind of prompt of the composition suite, a column for each run."""
    found = {run: json.loads((run / "eval" / "comparison.json").read_text())["metrics"] for run in runs}
    tags = [name for name in found[runs[0]] if name.startswith("tag_")]
    return [
        {"prompts": tag.removeprefix("tag_"), **{run.name: " ".join(change(found[run][tag])) for run in runs}}
        for tag in tags
    ]


def table(rows: list[dict[str, str]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    print(table([row(run) for run in finished]))
    name = "before_after.png"
    if by_category := categories(finished):
        print(f"\n{table(by_category)}")
        name = "composition.png"
    picture(finished[0]).save(Path(__file__).parent / name, optimize=True)
