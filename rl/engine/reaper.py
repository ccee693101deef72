"""Ends what is left of a Ray that was started here and removes its folder, once its owner has ended, however that came
about. A program of its own that needs no packages: `python reaper.py FOLDER`, whose standard input the owner holds
open for as long as it lives, and where it writes which other processes of its run have joined the Ray: they are spared.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator

PASSES, PAUSE_S = 50, 0.1  # a raylet that is ending may still start a process


def writers(folder: str) -> Iterator[int]:
    """The processes that write into a file under `folder`; those of other users are not seen."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(_writes(process, number, folder) for number in os.listdir(f"/proc/{process}/fd")):
                yield int(process)


def _writes(process: str, number: str, folder: str) -> bool:
    try:
        if not os.readlink(f"/proc/{process}/fd/{number}").startswith(f"{folder}/"):
            return False
        with open(f"/proc/{process}/fdinfo/{number}") as file:
            flags = int(file.read().split()[3], 8)  # pos: N, flags: N, ...
    except OSError:  # closed meanwhile
        return False
    return flags & os.O_ACCMODE != os.O_RDONLY


def reap(folder: str, spared: set[int]) -> None:
    for _ in range(PASSES):
        left = [process for process in writers(folder) if process not in spared]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not left and not os.path.exists(folder):
            return
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    owner = os.getppid()  # it may only have closed its Ray
    others = set(map(int, sys.stdin.read().split()))
    reap(os.path.realpath(sys.argv[1]), {owner, *others})
