"""Running the runs of a comparison, each in a process of its own, several at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

from imagerl.rl.compare.plan import PlannedRun
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.writing import lock_file
from imagerl.rl.run.folder import RunFolder
from imagerl.rl.run.signals import stop_signals

LOCK, LOG = "{}.lock", "{}.log"  # beside the run folder
Outcome = Literal["finished", "stopped", "failed", "elsewhere"]


class Process(Protocol):
    """The part of `subprocess.Popen` that is needed."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...


Start = Callable[[PlannedRun, Mapping[str, str], IO[bytes]], Process]


def arguments(run: PlannedRun) -> list[str]:
    """Return the arguments of `imagerl` to begin a run, or to continue what its folder holds of it."""
    resume = ["--resume"] if RunFolder(run.folder).begun else []
    return ["train", run.path, *run.overrides, *resume]


def start_training(run: PlannedRun, environment: Mapping[str, str], lock: IO[bytes]) -> Process:
    """Start `imagerl train`. It inherits the lock, so that a run whose comparison
    was killed is not started a second time; and a session of its own, so that Ctrl-C reaches it once, through us."""
    command = [sys.executable, "-m", "imagerl", *arguments(run)]
    with log_path(run).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )


def log_path(run: PlannedRun) -> Path:
    return run.folder.with_name(LOG.format(run.folder.name))


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may give away, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def job_environments(jobs: int, runs: Sequence[PlannedRun]) -> list[dict[str, str]]:
    """Return the environment of each of `jobs` places: a GPU of its own where there are any.

    Raises ImageRLError for more jobs than GPUs."""
    gpus = [] if all(run.recipe.engine.device == "cpu" for run in runs) else visible_gpus()
    if not gpus:
        return [{} for _ in range(jobs)]
    if jobs > len(gpus):
        raise ImageRLError(f"--jobs {jobs} needs a GPU each but {len(gpus)} can be seen; lower --jobs")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]


def execute(
    runs: Sequence[PlannedRun],
    environments: Sequence[Mapping[str, str]],
    note: Callable[[str], None] = print,
    start: Start | None = None,
    pause: float = 0.1,
) -> dict[PlannedRun, Outcome]:
    """Bring every run to its end, one for each environment at a time. A run that fails costs only itself. The first
    Ctrl-C or SIGTERM stops all after their step, with a checkpoint; a second one at once.

    Runs that another process is at (they are locked) are left to it."""
    outcomes: dict[PlannedRun, Outcome] = {}
    waiting = list(runs)
    active: dict[int, _Active] = {}
    with _counted_signals() as signals:
        while active or (waiting and not signals()):
            for place in range(len(environments)):
                while place not in active and waiting and not signals():
                    run = waiting.pop(0)
                    run.folder.parent.mkdir(parents=True, exist_ok=True)
                    lock = lock_file(run.folder.with_name(LOCK.format(run.folder.name)))
                    if lock is None:
                        outcomes[run] = "elsewhere"
                    elif run.finished:
                        lock.close()
                        outcomes[run] = "finished"
                    else:
                        note(f"{run.name}: {'continues' if run.folder.exists() else 'starts'}")
                        process = (start or start_training)(run, environments[place], lock)
                        active[place] = _Active(run, process, lock)
            for place, one in list(active.items()):
                one.forward(signals())
                code = one.process.poll()
                if code is not None:
                    one.lock.close()
                    del active[place]
                    stopped = code != 0 and signals() > 0
                    outcomes[one.run] = "stopped" if stopped else _outcome(one.run, code)
                    minutes = (time.monotonic() - one.began) / 60
                    note(f"{one.run.name}: {_told(one.run, outcomes[one.run], code)} ({minutes:.1f} min)")
            time.sleep(pause if active else 0)
    return outcomes | dict.fromkeys(waiting, "stopped")


@dataclass(slots=True)
class _Active:
    """A run that is going on, with the signals that it has been sent."""

    run: PlannedRun
    process: Process
    lock: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    sent: int = 0

    def forward(self, signals: int) -> None:
        """Pass on what has come since, to a run that was only then starting too."""
        while self.sent < signals:
            self.sent += 1
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


def _outcome(run: PlannedRun, code: int) -> Outcome:
    if code:
        return "failed"
    return "finished" if run.finished else "stopped"


def _told(run: PlannedRun, outcome: Outcome, code: int) -> str:
    """Tell the outcome, of a failure with the last line of its log."""
    if outcome != "failed":
        return outcome
    path = log_path(run)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"failed with {how}, see {path}" + (f": {last}" if last else "")


@contextlib.contextmanager
def _counted_signals() -> Iterator[Callable[[], int]]:
    """Inside, Ctrl-C and SIGTERM are only counted; the yielded function tells how many came."""
    count = 0

    def one_more(number: int, _: object) -> None:
        nonlocal count
        count += 1
        os.write(2, b"imagerl: stopping all runs after their step; once more to stop at once\n")

    with stop_signals(one_more):
        yield lambda: count
