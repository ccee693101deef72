"""Who may ask a served application, and where it listens."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import urllib3
from aiohttp import web

from imagerl.rl.commands.serving import serve, token_from
from imagerl.rl.errors import ImageRLError
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


def echo() -> web.Application:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application(client_max_size=1000)
    app.router.add_post("/x", handle)
    return app


AUTHORISED = {"Authorization": "Bearer of-the-tests"}
HALF = b"POST /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer of-the-tests\r\nContent-Length: 50\r\n\r\nhalf"


@contextmanager
def connected(address: str, sent: bytes) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(sent)
        yield connection


def post(address: str, body: bytes = b"b") -> urllib3.BaseHTTPResponse:
    return urllib3.request("POST", f"{address}/x", body=body, headers=AUTHORISED, retries=False, timeout=30)


def test_a_body_has_a_size_and_an_end() -> None:
    with served(echo(), body_s=0.3) as address:
        answer = post(address, b"x" * 1001)
        assert answer.status == 413 and "1001 bytes; at most 1000" in answer.json()["error"]
        parts = (b"x" * 600 for _ in range(2))  # chunked: the length is not told before
        answer = urllib3.request("POST", f"{address}/x", body=parts, headers=AUTHORISED, retries=False)
        assert answer.status == 413 and "at most 1000" in answer.json()["error"]
        with connected(address, HALF) as slow:
            assert b"408" in slow.recv(100)
        assert post(address).data == b"b"


def test_slow_senders_lose_their_places_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen that hold a place each and send nothing more closed the server for a minute."""
    monkeypatch.setattr("imagerl.rl.commands.serving.SENDING_S", 0.3)
    with served(echo(), waiting=16, body_s=600) as address, ExitStack() as stack:
        slow = [stack.enter_context(connected(address, HALF)) for _ in range(16)]
        statuses = [post(address).status]
        while statuses[-1] == 503:  # for as long as all of them may be honest
            statuses.append(post(address).status)
        assert statuses[-1] == 200
        assert b"408" in slow[0].recv(100)  # who has been sending longest
        slow[1].sendall(b"." * 46)  # the others go on, if they do
        assert b"200 OK" in slow[1].recv(1000)


def test_places_are_held_until_the_answer_and_given_back() -> None:
    app, entered, go = web.Application(), threading.Event(), threading.Event()

    async def handle(_: web.Request) -> web.Response:
        entered.set()
        await asyncio.to_thread(go.wait)
        return web.Response(text="done")

    app.router.add_post("/x", handle)
    with served(app, waiting=1) as address, connected(address, HALF.replace(b"50", b"4")) as first:
        assert entered.wait(30)
        busy = post(address)
        assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
        assert busy.json() == {"error": "1 requests are waiting already"}
        go.set()
        assert b"200 OK" in first.recv(100)
        assert [post(address).status for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("sent", [b"", b"POST /x HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagerl.rl.commands.serving.HEADERS_S", 0.3)
    with served(echo()) as address, connected(address, sent) as idle:
        assert idle.recv(100) == b""


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
