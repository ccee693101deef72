"""The machine, the versions and the command behind a run, and what of the environment may speak to it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from imagerl.rl.files.writing import write_atomic

ENVIRONMENT_FILE = "environment.json"
HIDDEN = "(not written)"  # in the place of a secret
PACKAGES = (
    *("imagerl", "torch", "transformers", "diffusers", "accelerate", "deepspeed", "peft", "trl", "ray"),
    *("paddleocr", "onnxruntime", "safetensors", "numpy", "pillow", "pydantic"),
)

# Families of variables by which the libraries below us, and those below them, let the environment decide how they
# compute: accumulation, precision, sharding, kernels, compilers. Also all that an Accelerate configuration file can
# say, because `accelerate launch` hands it on in such variables.
_SETTINGS = re.compile(
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|DS|DEEPSPEED|TORCH[A-Z]*|PYTORCH|DIFFUSERS|TRANSFORMERS"
    r"|ONEDNN|DNNL|XLA)_|CUBLAS(LT)?_EMULAT|(NVIDIA_TF32_OVERRIDE|ATEN_CPU_CAPABILITY|USE_HUB_KERNELS)$"
)
# What in these families only says where, between whom, how long, and what is told: ranks and transport, folders and
# caches, memory, building of extensions, logs.
_OPERATIONAL = re.compile(
    r"(TORCH_?ELASTIC|TORCH_(NCCL|GLOO|FR|DIST|DISTRIBUTED|SHOW))_|DS_BUILD_|(TORCH_CUDA_ARCH_LIST|PYTORCH_VERSION)$"
    r"|DS_(SKIP_CUDA_CHECK|IGNORE_CUDA_DETECTION|ENV_FILE)$|TORCH_DEVICE_BACKEND_AUTOLOAD$|ACCELERATE_CPU_AFFINITY$"
    r"|.*_(HOME|DIR|CACHE|OFFLINE|TIMEOUT|ALLOC_CONF|NVML_BASED_CUDA_CHECK|VERBOSE|VERBOSITY|\w*WARNINGS|LOGS?"
    r"|LOG_LEVEL|WEIGHTS_ONLY_LOAD)$|.*DEBUG"
)


def leave_to_the_recipe(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Take every variable out of the environment that would change what a recipe or a command computes, whoever reads
    it: to be called before torch and the like are imported. Returns their names. What is purely operational stays."""
    names = sorted(name for name in environment if _SETTINGS.match(name) and not _OPERATIONAL.match(name))
    for name in names:
        del environment[name]
    return names


def write_environment(run_dir: Path | str, argv: Sequence[str], files: Sequence[str] = ()) -> Path:
    """Record machine, versions, commit and command in environment.json; a resumed run adds its command. `files` are
    patterns of the names that the run writes: what may be deleted with it. Secrets in the command are left out.

    Returns the path of the file.
    """
    import torch

    path = Path(run_dir) / ENVIRONMENT_FILE
    session = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),  # as the recipe says or torch chose: another number may round otherwise
        "command": [_without_secrets(word) for word in argv],
    }
    listed = {"files": list(files)} if files else {}
    known = _read(path)
    if known is not None:
        known.setdefault("resumed", []).append(session)
        write_atomic(path, json.dumps(known | listed, indent=2, ensure_ascii=False))
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
    write_atomic(path, json.dumps(facts, indent=2, ensure_ascii=False))
    return path


def recorded_files(run_dir: Path | str) -> list[str]:
    """Return the patterns of a run's files by its own record; empty where there is none."""
    files = (_read(Path(run_dir) / ENVIRONMENT_FILE) or {}).get("files")
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []


def _read(path: Path) -> dict[str, Any] | None:
    """Read an environment.json; None where it is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _without_secrets(word: str) -> str:
    """Return a word of a command; of an override that sets environment variables of rewards only the key."""
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
    """Return the commit of this code, with `+changes` when tracked files differ; None for an installed copy, even
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
