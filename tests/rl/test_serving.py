"""Who may ask a served application, and where it listens."""

import asyncio
import socket

import pytest
import urllib3
from aiohttp import web

from rl.errors import ImageRLError
from rl.serving import serve, token_from
from tests.served import served


def test_the_token_is_checked_before_anything_else() -> None:
    app, seen = web.Application(), []

    async def handle(request: web.Request) -> web.Response:
        seen.append(await request.read())
        return web.Response(text="in")

    app.router.add_post("/x", handle)
    with served(app, "of-the-tests") as address:
        for headers, status in [
            ({}, 401),
            ({"Authorization": "Bearer of-the-test"}, 401),
            ({"Authorization": "bearer of-the-tests"}, 401),
            ({"Authorization": "Bearer ö"}, 401),
            ({"Authorization": "Bearer of-the-tests"}, 200),
        ]:
            encoded = {name: value.encode("utf-8") for name, value in headers.items()}
            answer = urllib3.request("POST", f"{address}/x", body=b"b", headers=encoded, retries=False)
            assert answer.status == status
        assert urllib3.request("GET", f"{address}/nowhere", retries=False).status == 401
    assert seen == [b"b"]


def test_a_token_is_needed_and_not_a_poor_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINE", raising=False)
    with pytest.raises(ImageRLError, match="set the environment variable MINE to a secret"):
        token_from("MINE")
    for poor in ("short", "two words and more", "schlüssel-wort"):
        monkeypatch.setenv("MINE", poor)
        with pytest.raises(ImageRLError, match="MINE must hold at least 8 printable") as error:
            token_from("MINE")
        assert poor not in str(error.value)
    monkeypatch.setenv("MINE", "long-enough\n")
    assert token_from("MINE") == "long-enough"


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ImageRLError, match=rf"cannot listen on 127.0.0.1:{port}: .*choose another --port"
        ):
            asyncio.run(serve(web.Application(), "127.0.0.1", port, print, asyncio.Event()))
