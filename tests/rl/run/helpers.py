"""Runs of the micro model by the command line, and what they left behind."""

from __future__ import annotations

from pathlib import Path

STEPS = 8
VARIANTS = {"full": (), "lora": ("model.lora={r: 4}",)}


def arguments(place: Path, variant: str, run: str, *more: str) -> list[str]:
    return ["train", str(place / f"{variant}.yaml"), f"run.output_dir={place / run}", *more]


def being_written(run: Path, pid: int) -> list[Path]:
    return list((run / "checkpoints").glob(f".step_*.tmp-{pid}@*"))
