"""Ctrl-C and SIGTERM, handled for a while."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

STOPS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 2.0  # a launcher passes on what its ranks have got already, if the signal went to all processes
AGAIN_S = 0.05  # between two tries to end a wait of the main thread
LEAVE_S = 4.0  # for a main thread to leave the step that is given up


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `handler`; afterwards whatever handled them before."""
    previous = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Stopping:
    """What a stop signal does to a run, as a context.

    The first one asks the run to stop after the step in flight and calls `on_ask`. If the run is still there `grace_s`
    seconds later, the step is given up: KeyboardInterrupt in the main thread. So does a second signal at once.

    A thread waits for the signals: while the main thread computes in C, or waits for another rank that will never
    answer, no handler written in Python runs. Only the main thread can handle signals: a run of another one is left
    alone."""

    def __init__(
        self, grace_s: float, on_ask: Callable[[], None], on_leave: Callable[[], None] = lambda: None
    ) -> None:
        """Set it up; `grace_s` 0 waits for the step however long it is. Both functions are called in another thread:
        `on_ask`, which must not wait, and `on_leave` where the main thread is stuck and the process must end."""
        self.grace_s = grace_s
        self.asked = False
        self.given_up = False
        self._on_ask, self._on_leave = on_ask, on_leave
        self._interrupting = self._interrupted = False
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stop signals", daemon=True)

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._wakeup = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._signals = stop_signals(self._handle)
        self._signals.__enter__()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher.ident is None:  # never started
            return
        self._over.set()
        os.write(self._written, b"\0")
        self._watcher.join()
        self._signals.__exit__(None, None, None)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._written)

    def _handle(self, number: int, frame: object) -> None:
        if self._interrupting and not self._interrupted and not self._over.is_set():
            self._interrupted = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = None
        while True:
            left = max(0.0, first + self.grace_s - time.monotonic()) if first and self.grace_s else None
            if not select.select([self._read], [], [], left)[0]:
                self.given_up = True
                break
            number = os.read(self._read, 1)[0]
            if self._over.is_set():
                return
            if number not in STOPS:
                continue
            if first is None:
                first = time.monotonic()
                self._ask()
            elif time.monotonic() - first > (ECHO_S if os.environ.get("WORLD_SIZE", "1") != "1" else 0):
                break
        self._interrupting = True
        until = time.monotonic() + LEAVE_S
        while not self._interrupted and not (self.given_up and time.monotonic() > until):
            # Ends waits, unlike a flag; again and again, because one that comes just before a wait begins does not.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if self._over.wait(AGAIN_S):
                return
        if self.given_up and not self._over.wait(max(0.0, until - time.monotonic())):
            self._on_leave()
            os._exit(0)  # it waits in C, for another rank or a kernel

    def _ask(self) -> None:
        self.asked = True
        if os.environ.get("RANK", "0") == "0":  # not by print, which the main thread may be in
            latest = f", in {self.grace_s:g} s at the latest" if self.grace_s else ""
            os.write(2, f"imagerl: stopping after this step{latest}; once more to stop at once\n".encode())
        self._on_ask()
