"""Retries, back-off and Retry-After, against a server that plays a script."""

import asyncio
import email.utils
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from rewards.client import Client, GaveUp, Refused, _seconds, secret
from rl.types import ImageRLError
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
