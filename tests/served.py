"""Web applications on this machine, for tests of those who ask them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imagerl.rl.commands.serving import guard, serve


@contextmanager
def served(app: Any, token: str | None = "of-the-tests", port: int = 0, **limits: Any) -> Iterator[str]:
    """Serves an application from a thread; yields "http://127.0.0.1:port". `limits` are those of `guard`."""
    if token is not None:
        guard(app, token, **limits)
    started, address, stops = threading.Event(), [], []

    async def run() -> None:
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))

        def announce(where: str) -> None:
            address.append(where)
            started.set()

        await serve(app, "127.0.0.1", port, announce, stop)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield address[0]
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
