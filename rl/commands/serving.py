"""Runs a web application for those who know a token, and takes from each no more than its share."""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from aiohttp import web

CLOSING_S = 5.0  # for requests under way when the server is told to stop
HEADERS_S = 15.0  # for the headers of a request, and for a connection that is kept open and not used
BODY_S = 60.0  # in which a request must have come in whole
SENDING_S = 5.0  # after which a request that is still coming in may lose its place
WAITING = 16  # requests held at a time, unless told
SHORTEST_TOKEN = 8
# Read ahead of a body: with 64 KiB both sides take turns hundreds of times for large pictures.
READ_BYTES = 2**22


def token_from(variable: str) -> str:
    """Read the token from an environment variable: not in an option, where every user of the machine could read it.

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


def guard(app: web.Application, token: str, waiting: int = WAITING, body_s: float = BODY_S) -> None:
    """Let in whole requests of those who know the token; handlers find the body read.

    401 without `Authorization: Bearer <token>`, before the body is read. 413 for a body above the application's
    `client_max_size`, and 408 for one that is not there after `body_s` seconds. 503 when `waiting` requests are being
    read or answered, with one exception: when one of them has been sending for more than SENDING_S, it loses its
    place (408), so that no number of slow senders keeps others out. An answer that is not 200 has JSON:
    {"error": "one line"}."""
    from aiohttp import web

    expected = f"Bearer {token}".encode()
    sending: dict[asyncio.Timeout, float] = {}  # when each began, the oldest first
    held = 0

    def refused(status: int, text: str, **headers: str) -> web.Response:
        return web.json_response({"error": text}, status=status, headers=headers)

    def makes_room(now: float) -> bool:
        longest = next(iter(sending), None)
        if longest is None or now - sending[longest] <= SENDING_S:
            return False
        del sending[longest]
        longest.reschedule(now)
        return True

    async def body_refusal(request: web.Request) -> web.Response | None:
        """Read the body; return the answer where that fails."""
        most = request.client_max_size
        if (request.content_length or 0) > most:
            return refused(413, f"the request has {request.content_length} bytes; at most {most} are taken")
        try:
            async with asyncio.timeout(body_s) as limit:
                sending[limit] = asyncio.get_running_loop().time()
                try:
                    await request.read()
                finally:
                    sending.pop(limit, None)
        except TimeoutError:
            return refused(
                408, f"the request did not come in within {body_s:g} s, or was slow while others waited"
            )
        except web.HTTPRequestEntityTooLarge:
            return refused(413, f"the request is too long; at most {most} bytes are taken")
        except ConnectionError:  # gave up while it sent; nobody will read this
            return refused(408, "you left")
        return None

    @web.middleware
    async def receive(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        nonlocal held
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, expected):
            return refused(401, "the token is missing or wrong", **{"WWW-Authenticate": "Bearer"})
        if held >= waiting and not makes_room(asyncio.get_running_loop().time()):
            return refused(503, f"{held} requests are waiting already", **{"Retry-After": "1"})
        held += 1
        try:
            return await body_refusal(request) or await handler(request)
        finally:
            held -= 1

    app.middlewares.insert(0, receive)


async def serve(
    app: web.Application, host: str, port: int, announce: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serve until `stop` is set. `announce` is called once with the address, "http://host:port".

    Raises ImageRLError when it cannot listen there."""
    from aiohttp import web

    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=CLOSING_S,
        read_bufsize=READ_BYTES,
        keepalive_timeout=HEADERS_S,
    )
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


def serve_until_signalled(
    app: web.Application, host: str, port: int, announce: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ImageRLError like `serve`."""

    async def until_signalled() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(app, host, port, announce, stop)

    asyncio.run(until_signalled())


def run_app(
    app: web.Application,
    host: str,
    port: int,
    token: str,
    announce: Callable[[str], None],
    waiting: int = WAITING,
) -> None:
    """Serve to holders of the token until Ctrl-C or SIGTERM; `waiting` is that of `guard`. Raises ImageRLError like
    `serve`."""
    guard(app, token, waiting)
    serve_until_signalled(app, host, port, announce)
