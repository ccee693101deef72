"""Commands as a user gives them, in this process, and what their runs found out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imagerl.rl.commands.cli import main
from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.files.metrics import is_timing, read_metrics


def exit_code(arguments: Sequence[str], *program: Any) -> int:
    """The exit code of `imagerl` with these arguments, or of another program and its name."""
    with pytest.raises(SystemExit) as ended:
        main(arguments, *program)
    return int(ended.value.code or 0)


def call(*arguments: str) -> int:
    return exit_code(arguments)


def imagerl(capsys: pytest.CaptureFixture[str], *arguments: str) -> SimpleNamespace:
    """`code`, `out` and `err` of a command."""
    capsys.readouterr()
    code = exit_code(arguments)
    printed = capsys.readouterr()
    return SimpleNamespace(code=code, out=printed.out, err=printed.err)


def measured(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not is_timing(k)} for record in read_metrics(run)]


def results(run: Path) -> dict[str, Any]:
    """All that a run found out, bit for bit."""
    (*_, newest) = list_checkpoints(run / "checkpoints")
    files = [newest / "model.safetensors", newest / "optimizer.safetensors"]
    files += sorted(f for part in ("samples/*", "eval/*", "model/*.safetensors") for f in run.glob(part))
    digests = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {"metrics": measured(run), "files": digests}


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]
