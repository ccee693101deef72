"""Draws docs/reward-hacking.png from a run: `python docs/make_hacking.py runs/hacking_demo`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.files.metrics import read_metrics

STEPS = (0, 10, 20, 30)
ROWS = 2  # of the run's grids; the first is shown


def pictures(run: Path) -> Image.Image:
    """The first row of the fixed prompts at each of STEPS, one under the other."""
    grids = [Image.open(run / "samples" / f"step_{step:06d}.png").convert("RGB") for step in STEPS]
    height, title = grids[0].height // ROWS, 20
    sheet = Image.new("RGB", (grids[0].width, len(grids) * (height + title)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (step, grid) in enumerate(zip(STEPS, grids, strict=True)):
        top = place * (height + title)
        draw.text((8, top + 4), f"step {step}", fill="black", font=font)
        sheet.paste(grid.crop((0, 0, grid.width, height)), (0, top + title))
    return sheet


def curves(run: Path, width: int) -> Image.Image:
    """The reward in training, and what was wanted, over steps."""
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(width / 100, 2.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (
        ("reward/mean", "reward: ink", {"color": "#b3382c"}),
        ("eval/ocr/exact_match", "gold: exact match", {"color": "#2a62c8", "marker": "o"}),
        ("eval/ocr/colours", "gold: colours", {"color": "#0f8a62", "marker": "s"}),
    ):
        known = [record for record in records if record.get(key) is not None]
        axes.plot([r["step"] for r in known], [r[key] for r in known], label=label, **style)
    alarm = min(record["step"] for record in records if record.get("alarm/hacking"))
    axes.axvline(alarm, color="#676c75", linestyle="--", linewidth=1)
    axes.text(alarm + 0.3, 0.02, "alarm", color="#676c75")
    axes.set(xlabel="step", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.38))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def figure(run: Path) -> Image.Image:
    upper = pictures(run)
    lower = curves(run, upper.width)
    sheet = Image.new("RGB", (upper.width, upper.height + lower.height), "white")
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    return sheet.quantize(96)


if __name__ == "__main__":
    figure(Path(sys.argv[1])).save(Path(__file__).with_name("reward-hacking.png"), optimize=True)
