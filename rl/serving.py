"""Runs a web application for those who know a token."""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from rl.errors import ImageRLError

if TYPE_CHECKING:
    from aiohttp import web

CLOSING_S = 5.0  # for requests under way when the server is told to stop
SHORTEST_TOKEN = 8
READ_BYTES = (
    2**22
)  # read ahead of a body: with 64 KiB both sides take turns hundreds of times for large pictures


def token_from(variable: str) -> str:
    """The token in an environment variable: not in an option, where every user of the machine could read it.

    Raises ImageRLError when there is none, or a poor one."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ImageRLError(
            f"set the environment variable {variable} to a secret that clients must know too, for example "
            f"export {variable}=$(openssl rand -hex 16)"
        )
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ImageRLError(f"{variable} must hold at least {SHORTEST_TOKEN} printable ASCII characters")
    return token


def guard(app: web.Application, token: str) -> None:
    """Answers 401 to every request without `Authorization: Bearer <token>`, before its body is read."""
    from aiohttp import web

    expected = f"Bearer {token}".encode()

    @web.middleware
    async def bearer_only(request: web.Request, handler: Callable[..., object]) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, expected):
            return web.json_response(
                {"error": "the token is missing or wrong"},
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)  # type: ignore[misc]

    app.middlewares.insert(0, bearer_only)


async def serve(
    app: web.Application, host: str, port: int, announce: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serves until `stop` is set. `announce` is called once with the address, "http://host:port".

    Raises ImageRLError when it cannot listen there."""
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING_S, read_bufsize=READ_BYTES)
    await runner.setup()
    try:
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ImageRLError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()


def run_app(app: web.Application, host: str, port: int, token: str, announce: Callable[[str], None]) -> None:
    """Serves to holders of the token until Ctrl-C or SIGTERM. Raises ImageRLError like `serve`."""
    guard(app, token)

    async def until_signalled() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(app, host, port, announce, stop)

    asyncio.run(until_signalled())
