"""Runs of the micro model by the command line, and what they left behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.files.metrics import is_timing, read_metrics

STEPS = 8
VARIANTS = {"full": (), "lora": ("model.lora={r: 4}",)}


def arguments(place: Path, variant: str, run: str, *more: str) -> list[str]:
    return ["train", str(place / f"{variant}.yaml"), f"run.output_dir={place / run}", *more]


def measured(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not is_timing(k)} for record in read_metrics(run)]


def results(run: Path) -> dict[str, Any]:
    """All that a run found out, bit for bit."""
    (*_, newest) = list_checkpoints(run / "checkpoints")
    files = [newest / "model.safetensors", newest / "optimizer.safetensors"]
    files += sorted((run / "samples").iterdir()) + sorted((run / "eval").iterdir())
    digests = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {"metrics": measured(run), "files": digests}


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def being_written(run: Path, pid: int) -> list[Path]:
    return list((run / "checkpoints").glob(f".step_*.tmp-{pid}@*"))
