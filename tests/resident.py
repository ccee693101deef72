"""Resident memory of a task, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PAUSE = 0.002  # seconds between two looks: what is written meanwhile is some MB


def alone(code: str, *arguments: str) -> Any:
    """What code prints last, as JSON, run by a fresh interpreter whose freed memory goes back to the system at once:
    so what is resident is what is in use. AssertionError with its last words if it fails."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def grown(task: Callable[[], object]) -> int:
    """Bytes by which the peak within a task lies above the start; what it returns is kept to the end.

    The peak is looked for by a thread: the kernel's own counts the imports before the task too, and not every
    machine lets a process reset it."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(PAUSE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = task()
        peak = max(peak, process.memory_info().rss)
        del kept
    finally:
        done.set()
        watcher.join()
    return peak - before
