"""Ctrl-C and SIGTERM, handled for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `handler`; afterwards whatever handled them before."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
