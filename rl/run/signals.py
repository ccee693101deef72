"""Ctrl-C and SIGTERM, handled for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `handler`; afterwards whatever handled them before. Only the main thread can
    handle signals: in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
