"""Serve a reward as a web application, the other side of `rewards.boundary.remote`. Who may ask, how long
sending may take and how many may wait is not decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from imagerl.rewards.boundary.guard import score_samples
from imagerl.rewards.boundary.targets import SAMPLE_NAMES, check_columns
from imagerl.rewards.boundary.wire import LIMITS, VERSION, Limits, WireError, pack_reply, unpack_request
from imagerl.rewards.pictures import open_png
from imagerl.rl.types import ImageRLError, RewardFn

if TYPE_CHECKING:
    from aiohttp import web


def reward_app(
    label: str,
    reward: RewardFn,
    parameters: Sequence[str],
    needed: Sequence[str] = (),
    limits: Limits = LIMITS,
) -> web.Application:
    """Return an app: `POST /<label>` scores, `GET /<label>` tells what is served. Requests are unpacked and scored by
    one thread, one after the other, so pictures of a single request are in memory at a time.

    `parameters` are the names that the reward takes; `needed` the columns without which it cannot be called."""
    from aiohttp import web

    thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
    turn = asyncio.Lock()

    def problem(status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status)

    def answer(body: bytes) -> bytes:
        samples = unpack_request(body, open_png, limits)
        check_columns(label, needed, [name for name in samples if name not in SAMPLE_NAMES])
        return pack_reply(*score_samples(reward, samples))

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(
            {"name": label, "version": VERSION, "parameters": list(parameters), "limits": limits._asdict()}
        )

    async def score(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            async with turn:
                if request.transport is None:  # gave up while it waited
                    return problem(408, "you left")
                told = await asyncio.get_running_loop().run_in_executor(thread, answer, body)
            return web.Response(body=told, content_type="application/json")
        except WireError as error:
            return problem(error.status, str(error))
        except ImageRLError as error:
            return problem(422, str(error))

    app = web.Application(client_max_size=limits.body)
    app.router.add_get(f"/{label}", describe)
    app.router.add_post(f"/{label}", score)
    return app
