"""Run a reward in a Python interpreter of its own, so that its packages never meet the trainer's."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from imagerl.rewards.boundary.client import Answer, Client, GaveUp
from imagerl.rewards.boundary.remote import RemoteReward
from imagerl.rl.errors import ImageRLError, one_line

START_S = 280.0  # to import and construct; the actor around it has 300
ATTEMPTS = 2  # of one call, when the process dies under it
PATIENCE_S = 48.0  # of one call, unless told
DYING_S = 0.5  # for a process that has hung up to be seen to end
MOST_PRINTED = 2**20  # bytes kept of what it prints
CHILD = Path(__file__).with_name("child.py")
# Of the environment: what would show the interpreter our packages.
OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class InterpreterReward(RemoteReward):
    """Runs `target` ("file.py:function" or "package.module:function") under another `python`, behind HTTP on loopback.

    The process is started at once, stopped with this object, and started again when it has died or did not answer
    within `patience_s` seconds. A call under which it dies is made once more; then its samples are NaN, as they are
    after a time-out. Raises ImageRLError when the reward cannot be loaded there, asks for a column that is not in
    `columns` (None: not checked), or says itself that something must be mended."""

    def __init__(
        self,
        python: str,
        target: str,
        settings: Mapping[str, object],
        patience_s: float | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._python = python
        self._label = target.rpartition(":")[2]
        self._token = secrets.token_hex(16)
        names = None if columns is None else list(columns)
        wanted = {"target": target, "settings": dict(settings), "columns": names, "token": self._token}
        try:
            self._wanted = json.dumps(wanted).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise ImageRLError(f"settings of reward {self._label!r} must be plain YAML: {error}") from error
        self._prefix, self._batch = "", sys.maxsize
        self._patience_s = patience_s or PATIENCE_S
        self._stderr: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (lives as long as the reward)
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _send(self, body: bytes, deadline: float) -> Answer:
        died = None
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._start()
            if os.fstat(self._stderr.fileno()).st_size > MOST_PRINTED:
                self._stderr.truncate(0)
            try:
                return self._client.send("POST", body, time.monotonic() + self._patience_s, self._patience_s)
            except GaveUp:
                died = self._last_words()
                self.close()
                if died is None:
                    raise GaveUp(f"no answer within {self._patience_s:g} s") from None
        raise GaveUp(f"its process died {ATTEMPTS} times on this call: {died}")

    def _start(self) -> None:
        """Start the process and have it load the reward. Raises ImageRLError for what must be mended."""
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
        self._process = process
        self._stop = weakref.finalize(self, _stop, process)
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._wanted)
            process.stdin.flush()
        ready = select.poll()
        ready.register(process.stdout)
        said = process.stdout.readline() if ready.poll(START_S * 1000) else b""
        if not said:
            died = self._last_words()
            self.close()
            what = "is not ready" if died is None else f"does not start: {died}"
            raise ImageRLError(f"reward {self._label!r} under {self._python} {what}")
        told = json.loads(said)
        if "mend" in told:
            self.close()
            raise ImageRLError(f"{told['mend']} (under {self._python})")
        self.parameters: list[str] = told["parameters"]
        self._client = Client(f"http://127.0.0.1:{told['port']}/", self._token, again=False)

    def _last_words(self) -> str | None:
        """Return the last line that the process wrote, or how it ended; None while it runs."""
        assert self._process is not None
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            return None
        self._stderr.seek(0)
        lines = self._stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
        return one_line(lines[-1], 200) if lines else f"exit code {code}"

    def close(self) -> None:
        """End the process; the next call starts another one."""
        self._process = None
        self._stop()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
