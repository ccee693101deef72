"""Retries, back-off and Retry-After, against a server that plays a script."""

import asyncio
import email.utils
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from imagerl.rewards.boundary.client import Client, GaveUp, Refused, _seconds, secret
from imagerl.rl.types import ImageRLError
from tests.served import served


def scripted(*answers: Any) -> tuple[web.Application, list[float]]:
    """An application that gives one answer after the other, the last for ever, and when it was asked."""
    asked: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(time.monotonic())
        answer = answers[min(len(asked), len(answers)) - 1]
        return await answer(request) if callable(answer) else web.Response(**answer)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    return app, asked


def send(address: str, patience_s: float = 20.0, attempt_s: float = 10.0):
    client = Client(f"{address}/x", "of-the-tests")
    return client.send("POST", b"body", time.monotonic() + patience_s, attempt_s)


def test_failures_are_retried_with_growing_pauses() -> None:
    app, asked = scripted({"status": 503}, {"status": 500}, {"status": 429}, {"text": "at last"})
    with served(app) as address:
        answer = send(address)
    assert (answer.body, answer.attempts) == (b"at last", 4)
    pauses = [after - before for before, after in pairwise(asked)]
    assert [low <= pause for low, pause in zip((0.25, 0.5, 1.0), pauses, strict=True)] == [True] * 3


def test_retry_after_is_honoured() -> None:
    app, asked = scripted({"status": 429, "headers": {"Retry-After": "1.2"}}, {"text": "ok"})
    with served(app) as address:
        assert send(address).attempts == 2
    assert asked[1] - asked[0] >= 1.2
    app, asked = scripted({"status": 429, "headers": {"Retry-After": "3600"}, "text": "tomorrow"})
    started = time.monotonic()
    with served(app) as address, pytest.raises(GaveUp, match=r"HTTP 429: tomorrow \(tried 1 times\)"):
        send(address, patience_s=5)
    assert len(asked) == 1 and time.monotonic() - started < 4  # it would not come in time: no waiting


def test_retry_after_may_be_a_date() -> None:
    soon = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (_seconds(soon) or 0) <= 100
    assert (
        _seconds("7") == 7.0 and _seconds("-7") == 0.0 and _seconds("soon") is None and _seconds(None) is None
    )


def test_a_refusal_is_not_retried_and_told_in_the_servers_words() -> None:
    for body, said in [
        ('{"error": "too red"}', "HTTP 400: too red"),
        ('{"error": {"message": "no\\n such model"}}', "HTTP 400: no such model"),
        ("plain", "HTTP 400: plain"),
        ("", "HTTP 400: without a word"),
    ]:
        app, asked = scripted({"status": 400, "text": body})
        with served(app) as address, pytest.raises(Refused) as refusal:
            send(address)
        assert str(refusal.value) == said and refusal.value.status == 400 and len(asked) == 1


def test_redirects_do_not_carry_the_token_elsewhere() -> None:
    target, asked = scripted({"text": "stolen"})
    with served(target, token=None) as elsewhere:
        app, _ = scripted({"status": 307, "headers": {"Location": elsewhere}})
        with served(app) as address, pytest.raises(Refused) as refusal:
            send(address)
    assert refusal.value.status == 307 and not asked


def test_an_answer_that_trickles_has_an_end() -> None:
    async def trickle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(30):
            await response.write(b".")
            await asyncio.sleep(0.05)
        return response

    app, _ = scripted(trickle)
    started = time.monotonic()
    with served(app) as address, pytest.raises(GaveUp, match=r"no answer within 0\.3 s"):
        send(address, patience_s=0.5, attempt_s=0.3)
    assert time.monotonic() - started < 8


def test_secrets_come_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", " word \n")
    assert secret("MINE", "a key") == "word"
    monkeypatch.delenv("MINE")
    with pytest.raises(ImageRLError, match="set the environment variable MINE to a key"):
        secret("MINE", "a key")
    monkeypatch.setenv("MINE", "two\nlines")
    with pytest.raises(ImageRLError, match="printable ASCII") as error:
        secret("MINE", "a key")
    assert "lines" not in str(error.value)


@contextmanager
def dripping(start: bytes) -> Iterator[tuple[str, threading.Event]]:
    """A server that answers `start` and then one byte every 50 ms, for ever. The event: a client was seen to leave."""
    left, over = threading.Event(), threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(2**16)
                connection.sendall(start)
                while not over.wait(0.05):
                    connection.sendall(b"x")
            except OSError:
                left.set()

    def accept(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=[listening.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, args=[listening], daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", left
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n",
    ],
    ids=["status", "headers", "body", "chunk"],
)
def test_a_server_that_drips_does_not_extend_the_deadline(start: bytes) -> None:
    """Each byte comes well within any time-out of a single read; the call ends none the less, and hangs up."""
    with ThreadPoolExecutor(1) as thread, dripping(start) as (address, left):
        call = thread.submit(send, address, 1.0, 0.4)
        with pytest.raises((GaveUp, Refused), match=r"no answer within 0\.4 s \(tried"):
            call.result(timeout=30)  # without a deadline: never
        assert left.wait(20)


def test_a_call_may_come_from_where_a_loop_runs() -> None:
    """As in a notebook."""

    async def cell(address: str) -> bytes:
        return send(address).body

    app, _ = scripted({"text": "ok"})
    with served(app) as address:
        assert asyncio.run(cell(address)) == b"ok"


def test_what_is_no_address_is_said() -> None:
    with pytest.raises(ImageRLError, match="http://host:99999/x is no address: Port out of range"):
        Client("http://host:99999/x", None)


def test_a_server_that_is_gone_is_told_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}/x", "of-the-tests")

    def ask() -> bytes:
        return client.send("POST", b"body", time.monotonic() + 60, 10.0).body

    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(ask) for _ in range(2)]
        while not caplog.messages:
            time.sleep(0.05)
        assert not any(answer.done() for answer in answers)  # told while it waits, not after
        with served(scripted({"text": "ok"})[0], port=port):
            assert [answer.result() for answer in answers] == [b"ok", b"ok"]
    first, second = caplog.messages
    assert first.startswith(f"http://127.0.0.1:{port}/x: Connection refused; trying again for up to ")
    assert second == f"http://127.0.0.1:{port}/x: answers again"


def test_a_server_cannot_write_to_the_terminal() -> None:
    app, _ = scripted(
        {"status": 400, "text": '{"error": "\\u001b[31mred\\u001b[0m \\u001b]0;title\\u0007\\u009b2J!"}'}
    )
    with served(app) as address, pytest.raises(Refused, match=r"^HTTP 400: red !$"):
        send(address)
