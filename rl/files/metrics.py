"""The output of a run while it runs: metrics.jsonl, progress, timings."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import parse_json
from imagerl.rl.files.writing import write_atomic, write_error

if TYPE_CHECKING:
    from rich.console import Console

METRICS_FILE = "metrics.jsonl"
LARGE = 1e7  # from here on a number is written by its power of ten


def is_timing(key: str) -> bool:
    """Tell whether a metric depends on the clock. All others repeat bit for bit in a resumed run."""
    return any(word in key for word in ("time", "per_s", "share"))


def to_json(value: object, indent: int | None = None) -> str:
    """Write JSON that every parser takes: NaN and infinities become null, numpy and 0-d tensors plain numbers,
    dataclasses mappings.

    Floats are written so that reading them back gives the same bits.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: object) -> object:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class Record(BaseModel):
    """One line of metrics.jsonl: a step and its numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | bool | None]

    step: int = Field(ge=0, strict=True)


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl in file order; a last line cut off by a crash is skipped.

    Raises:
        ImageRLError: a line before the last is not a JSON object with `step`.
    """
    path = Path(run_dir) / METRICS_FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        try:
            record = parse_json(line.decode(), "it")
            validated(Record, record, "it")
        except (UnicodeDecodeError, ImageRLError) as error:
            raise ImageRLError(f"{path} line {number} is damaged; delete that line and try again") from error
        records.append(record)
    return records


def _evaluates(record: Mapping[str, object]) -> bool:
    return any(key.startswith("eval/") for key in record)


class MetricsLog:
    """Appends metrics to `metrics.jsonl`.

    A line is on the disk when `log` returns, so log a step *before* saving its checkpoint: a resumed run
    then finds every step up to that checkpoint. `resume_step` is the step of the checkpoint that the run
    continues from; lines of later steps are dropped. A run killed before its first checkpoint resumes
    with −1, which drops all. None starts a new file. With `looked` false the run was stopped before the evaluation
    after `resume_step` was done, which comes again: its line is dropped too.

    Raises:
        ImageRLError: a new run would write into a folder that already holds metrics; disk full.
    """

    def __init__(self, run_dir: Path | str, resume_step: int | None = None, looked: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        records = read_metrics(run_dir)
        if resume_step is None:
            if records:
                raise ImageRLError(
                    f"{self.path.parent} already holds a run; add --resume or set another run.output_dir"
                )
            kept = []
        else:
            last = resume_step - (not looked)
            again = [r for r in records if r["step"] == resume_step and not looked and not _evaluates(r)]
            kept = [record for record in records if record["step"] <= last] + again
        # The whole file anew: a torn last line goes, and readers see the old or the new one.
        write_atomic(self.path, "".join(to_json(record) + "\n" for record in kept))
        self._file = _open_to_append(self.path)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line. Values are numbers, booleans, None, or 0-d arrays and tensors.

        Raises:
            TypeError: a value is none of these.
            ImageRLError: the disk is full.
        """
        record: dict[str, object] = {"step": int(step)}
        for key, value in metrics.items():
            record[key] = _plain(value)
            if not isinstance(record[key], int | float | None):
                raise TypeError(f"metric {key} must be a number, got {type(value).__name__}")
        _append(self._file, (to_json(record) + "\n").encode())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_to_append(path: Path) -> io.FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise write_error(path, error) from error


def _append(file: io.FileIO, data: bytes) -> None:
    """Write `data` at the end of a file, durably. Raises ImageRLError when the disk is full."""
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # A checkpoint saved after this line must never be newer than the metrics on the disk.
        os.fsync(file.fileno())
    except OSError as error:
        raise write_error(Path(file.name), error) from error


class Progress:
    """Live line with step, total reward, KL, exact match and time left; `with Progress(steps) as progress:`.

    Where the output is not a terminal it prints one short line every `every` steps instead.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, console: Console | None = None, every: int = 10
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._total, self._every = total_steps, every
        self._console = console or Console()
        self._times: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=20)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console)
            text = f"step {start_step}/{total_steps}"
            self._task = self._bar.add_task(text, total=total_steps, completed=start_step)

    def update(self, step: int, metrics: Mapping[str, float | None], expected: int | None = None) -> None:
        """Show `step` (the number of steps done) with the metrics of that step; `expected` corrects the total."""
        self._total = expected or self._total
        self._times.append((step, time.monotonic()))
        text = progress_line(step, self._total, metrics, self._seconds_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=self._total, description=text)
        elif step == 1 or step == self._total or step % self._every == 0:
            self._print(text)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar. It may hold words of others, such as a reward's."""
        self._print(one_line(text))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        (first_step, first), (_, last) = self._times[0], self._times[-1]
        return (last - first) / max(1, step - first_step) * (self._total - step)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def fixed(value: float, digits: int = 3, sign: bool = False) -> str:
    """Write a number with so many digits after the point; one that is too large for that by its power of ten."""
    plus = "+" if sign else ""
    return f"{value:{plus}.{digits}f}" if abs(value) < LARGE else f"{value:{plus}.{digits}g}"


def progress_line(step: int, total: int, metrics: Mapping[str, float | None], seconds_left: float) -> str:
    """Return `step 10/200  total 0.423  KL 0.0012  exact 41 %  3m12s left`, without what is not measured."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    if (reward := metrics.get("reward/mean")) is not None:
        parts.append(f"total {fixed(reward)}")
    if (kl := metrics.get("kl/k3")) is not None:
        parts.append(f"KL {kl:.4f}")
    if reward is None and (loss := metrics.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    exact = [v for k, v in metrics.items() if k.startswith("reward/") and k.endswith("exact_match/mean")]
    if exact and exact[0] is not None:
        parts.append(f"exact {100 * exact[0]:.0f} %")
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return "  ".join([*parts, f"{left} left"])
