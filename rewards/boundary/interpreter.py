"""Run a reward in a Python interpreter of its own, so that its packages never meet the trainer's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import struct
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from imagerl.rewards.boundary.wire import WireError, pack_request, unpack_reply
from imagerl.rewards.pictures import to_quick_png
from imagerl.rl.types import ImageRLError, RewardOutput

START_S = 280.0  # to import and construct; the actor around it has 300
ATTEMPTS = 2  # of one call, when the process dies under it
PATIENCE_S = 48.0  # of one call, unless told
MOST_PRINTED = 2**20  # bytes kept of what it prints
PIPE_BYTES = 2**20
CHILD = Path(__file__).with_name("child.py")
# Of the environment: what would show the interpreter our packages.
OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class _Died(Exception):
    """The process ended. The message is the last line it wrote."""


class InterpreterReward:
    """Runs `target` ("file.py:function" or "package.module:function") under another `python`.

    The process is started at once, stopped with this object, and started again when it has died or did not answer
    within `patience_s` seconds. A call under which it dies is made once more; then its samples are NaN, as they are
    after a time-out. Raises ImageRLError when the reward cannot be loaded there, asks for a column that is not in
    `columns` (None: not checked), or says itself that something must be mended."""

    def __init__(
        self,
        python: str,
        target: str,
        settings: Mapping[str, Any],
        patience_s: float | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._python = python
        self._label = target.rpartition(":")[2]
        try:
            self._wanted = json.dumps(
                {
                    "target": target,
                    "settings": dict(settings),
                    "columns": list(columns) if columns is not None else None,
                }
            ).encode()
        except (TypeError, ValueError) as error:
            raise ImageRLError(f"settings of reward {self._label!r} must be plain YAML: {error}") from error
        self._patience_s = patience_s or PATIENCE_S
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (lives as long as the reward)
        self._start()

    def __call__(
        self,
        *,
        prompts: list[str],
        completions: list[list[int]],
        images: list[Any],
        completion_ids: Any = None,
        **columns: list[Any],
    ) -> RewardOutput:
        try:
            body = pack_request(prompts, completions, images, columns, to_quick_png)
        except WireError as error:
            raise ImageRLError(f"reward {self._label!r}: {error}") from error
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                if self._process is None:
                    self._start()
                answer = self._exchange(body, self._patience_s)
            except _Died as death:
                reason = f"its process died {ATTEMPTS} times on this call: {death}"
                continue
            except TimeoutError:
                self.close()
                reason = f"no answer within {self._patience_s:g} s"
                break
            return self._output(answer, len(prompts))
        return RewardOutput([math.nan] * len(prompts), {}, reason)

    def _output(self, answer: bytes, size: int) -> RewardOutput:
        told = json.loads(answer)
        if "mend" in told:
            raise ImageRLError(told["mend"])
        return RewardOutput(*unpack_reply(answer, size))

    def _start(self) -> None:
        """Start the process and have it load the reward. Raises _Died, or ImageRLError for what must be mended."""
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        self._stderr.truncate(0)
        try:
            process = subprocess.Popen(
                [self._python, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
            )
        except OSError as error:
            raise ImageRLError(f"reward {self._label!r}: {self._python} does not start: {error}") from error
        assert process.stdin is not None
        _prepare(process.stdin.fileno())
        self._process = process
        self._stop = weakref.finalize(self, _stop, process)
        try:
            told = json.loads(self._exchange(self._wanted, START_S))
        except (_Died, TimeoutError) as error:
            self.close()
            what = "is not ready" if isinstance(error, TimeoutError) else f"does not start: {error}"
            raise ImageRLError(f"reward {self._label!r} under {self._python} {what}") from error
        if "mend" in told:
            self.close()
            raise ImageRLError(f"{told['mend']} (under {self._python})")
        self.parameters: list[str] = told["parameters"]

    def _exchange(self, body: bytes, patience_s: float) -> bytes:
        """Send a frame and wait for the answer. Raises _Died, or TimeoutError."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        if os.fstat(self._stderr.fileno()).st_size > MOST_PRINTED:
            self._stderr.truncate(0)
        deadline = time.monotonic() + patience_s
        try:
            _write(process.stdin.fileno(), struct.pack(">Q", len(body)) + body, deadline)
            (size,) = struct.unpack(">Q", _read(process.stdout.fileno(), 8, deadline))
            return _read(process.stdout.fileno(), size, deadline)
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            self.close()
            raise _Died(self._last_words(process.returncode)) from error

    def _last_words(self, code: int) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
        return " ".join(lines[-1].split())[:200] if lines else f"exit code {code}"

    def close(self) -> None:
        """End the process; the next call starts another one."""
        self._process = None
        self._stop()


def _stop(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.kill()
    process.wait()


def _prepare(descriptor: int) -> None:
    """Make writing to a pipe return instead of wait, and the pipe large where the system lets us: with 64 KiB the two
    processes would take turns a thousand times for a large picture."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _wait(descriptor: int, writing: bool, deadline: float) -> None:
    """Return when a pipe is ready. Raises TimeoutError."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(descriptor, True, deadline)
        view = view[
            os.write(descriptor, view[: select.PIPE_BUF]) :
        ]  # what a ready pipe takes without blocking


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _wait(descriptor, False, deadline)
        part = os.read(descriptor, min(size - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
