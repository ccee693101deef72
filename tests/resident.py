"""Resident memory of this process, for tests that measure in a process of their own. Linux."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def grown(task: Callable[[], object]) -> int:
    """Bytes by which the peak within a task lies above the start; what it returns is kept to the end.

    The peak begins anew: that of a whole process may be one of importing, larger where bytecode is compiled first."""
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    kept = task()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])
