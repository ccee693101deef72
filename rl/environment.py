"""The machine, the versions and the command behind a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rl.files import write_atomic
from rl.metrics import to_json
from rl.reward_config import HIDDEN

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    *("imagerl", "torch", "transformers", "diffusers", "accelerate", "deepspeed", "peft", "trl", "ray"),
    *("paddleocr", "onnxruntime", "safetensors", "numpy", "pillow", "pydantic"),
)


def write_environment(run_dir: Path | str, argv: Sequence[str], files: Sequence[str] = ()) -> Path:
    """Record machine, versions, commit and command in environment.json; a resumed run adds its command. `files` are
    patterns of the names that the run writes: what may be deleted with it. Secrets in the command are left out.

    Returns the path of the file.
    """
    path = Path(run_dir) / ENVIRONMENT_FILE
    session = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [_without_secrets(word) for word in argv],
    }
    listed = {"files": list(files)} if files else {}
    known = _read(path)
    if known is not None:
        known.setdefault("resumed", []).append(session)
        write_atomic(path, to_json(known | listed, indent=2))
        return path
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = session | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": _gpus(),
        "git_commit": _git_commit(),
        "packages": packages,
        **listed,
    }
    write_atomic(path, to_json(facts, indent=2))
    return path


def recorded_files(run_dir: Path | str) -> list[str]:
    """The patterns of a run's files by its own record; empty where there is none."""
    files = (_read(Path(run_dir) / ENVIRONMENT_FILE) or {}).get("files")
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []


def _read(path: Path) -> dict[str, Any] | None:
    """An environment.json; None where it is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _without_secrets(word: str) -> str:
    """A word of a command; of an override that sets environment variables of rewards only the key."""
    key, equals, _ = word.partition("=")
    return f"{key}={HIDDEN}" if equals and "env_vars" in word else word


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    """Commit of this code, with `+changes` when tracked files differ; None for an installed copy, even
    one that lies inside somebody else's repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
