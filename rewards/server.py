"""The other side of `rewards.remote`: a reward as a web application. Who may ask is not decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rewards.boundary import score_samples
from rewards.pictures import open_png
from rewards.targets import SAMPLE_NAMES, check_columns
from rewards.wire import LIMITS, VERSION, Limits, WireError, pack_reply, unpack_request
from rl.types import ImageRLError, RewardFn

if TYPE_CHECKING:
    from aiohttp import web

BODY_S = 60.0  # in which a request must have come in whole


def reward_app(
    label: str,
    reward: RewardFn,
    parameters: Sequence[str],
    needed: Sequence[str] = (),
    limits: Limits = LIMITS,
    waiting: int = 16,
    body_s: float = BODY_S,
) -> web.Application:
    """`POST /<label>` scores, `GET /<label>` tells what is served. The reward is called by one thread, one request
    after the other, and at most `waiting` requests are held at a time; more are told to come again.

    `parameters` are the names that the reward takes; `needed` the columns without which it cannot be called."""
    from aiohttp import web

    thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
    turn = asyncio.Lock()
    held = 0

    def problem(status: int, text: str, **headers: str) -> web.Response:
        return web.json_response({"error": text}, status=status, headers=headers)

    def answer(body: bytes) -> bytes:
        samples = unpack_request(body, open_png, limits)
        check_columns(label, needed, [name for name in samples if name not in SAMPLE_NAMES])
        return pack_reply(*score_samples(reward, samples))

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(
            {
                "name": label,
                "version": VERSION,
                "parameters": list(parameters),
                "limits": limits._asdict(),
            }
        )

    async def read(request: web.Request) -> bytes:
        if (request.content_length or 0) > limits.body:
            raise WireError(
                f"the request has {request.content_length} bytes; at most {limits.body} are taken", 413
            )
        async with asyncio.timeout(body_s):
            return await request.read()

    async def score(request: web.Request) -> web.Response:
        nonlocal held
        if held >= waiting:
            return problem(503, f"{held} requests are waiting already", **{"Retry-After": "1"})
        held += 1
        try:
            body = await read(request)
            async with turn:
                if request.transport is None:  # gave up while it waited
                    return problem(408, "you left")
                told = await asyncio.get_running_loop().run_in_executor(thread, answer, body)
            return web.Response(body=told, content_type="application/json")
        except WireError as error:
            return problem(error.status, str(error))
        except TimeoutError:
            return problem(408, f"the request did not come in within {body_s:g} s")
        except ConnectionError:  # gave up while it sent; nobody will read this
            return problem(408, "you left")
        except ImageRLError as error:
            return problem(422, str(error))
        finally:
            held -= 1

    app = web.Application(client_max_size=limits.body)
    app.router.add_get(f"/{label}", describe)
    app.router.add_post(f"/{label}", score)
    return app
