"""Speak HTTP with a time limit over all attempts: retries, back-off, `Retry-After`, and no answer without an end."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import logging
import os
import random
import threading
import time
import urllib.request
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

from imagerl.rl.errors import ImageRLError, one_line

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_S = 5.0
TOLD_AFTER_S = 1.5  # of failures; a server that starts again is often back before
MOST_BYTES = 64 * 2**20  # of an answer

_logger = logging.getLogger(__name__)


class Refused(Exception):
    """The server will not do it, however often it is asked. `status` is HTTP's, `words` are the server's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.status, self.words = status, words


class GaveUp(Exception):
    """No answer within the time; the message is the last thing that went wrong."""


class Answer(NamedTuple):
    body: bytes
    attempts: int


class Client:
    """Sends requests to one server, whose address is `url`. `token` is its bearer token. Safe to use from many threads.

    With `again` False it is asked once. Proxies of the environment are used as usual, but never for this machine
    itself. Redirects are not followed: they would carry the token elsewhere. When a server cannot be had for a while,
    one warning says so.

    Raises ImageRLError for what is no address."""

    def __init__(self, url: str, token: str | None, again: bool = True) -> None:
        try:
            urlsplit(url).port  # noqa: B018 (it is looked at when asked for)
        except ValueError as error:
            raise ImageRLError(f"{url} is no address: {error}") from error
        self._url = url
        self._headers = {
            "Accept-Encoding": "identity",
            **({"Authorization": f"Bearer {token}"} if token else {}),
        }
        self._again = again
        self._jitter = random.Random(0)
        self._proxy = _proxy_for(url)
        self._warned = False

    def send(
        self,
        method: str,
        body: bytes | None,
        deadline: float,
        attempt_s: float,
        headers: Mapping[str, str] | None = None,
        path: str = "",
    ) -> Answer:
        """Return the answer to a request, tried until `deadline` (of `time.monotonic`), each time for `attempt_s`
        seconds: looking up the name, connecting, sending, waiting, and the last byte of the answer included.

        Raises Refused for a status that another attempt would not change, and GaveUp."""
        asking = self._send(
            method, self._url + path, body, deadline, attempt_s, {**self._headers, **(headers or {})}
        )
        answer = asyncio.run_coroutine_threadsafe(asking, _loop(os.getpid()))
        try:
            return answer.result()
        finally:
            answer.cancel()  # after Ctrl-C; else it is done

    async def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        deadline: float,
        attempt_s: float,
        headers: Mapping[str, str],
    ) -> Answer:
        attempts, started = 0, time.monotonic()
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                attempts += 1
                asked = None
                try:
                    async with asyncio.timeout(min(deadline - time.monotonic(), attempt_s)):
                        status, data, asked = await self._once(session, method, url, body, headers)
                    if status == 200:
                        self._answered()
                        return Answer(data, attempts)
                    refusal = Refused(status, _message(data))
                    if status not in RETRIED:
                        raise refusal
                    problem = str(refusal)
                except TimeoutError:  # of the attempt, or of connecting
                    problem = f"no answer within {attempt_s:g} s"
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    problem = _reason(error)
                pause = self._pause(attempts, asked)
                left = deadline - time.monotonic()
                if pause >= left or not self._again:
                    raise GaveUp(f"{problem} (tried {attempts} times)")
                if time.monotonic() + pause - started > TOLD_AFTER_S:
                    self._warn(f"{url}: {problem}; trying again for up to {left:.0f} s")
                await asyncio.sleep(pause)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _logger.warning(text)

    def _answered(self) -> None:
        if self._warned:
            self._warned = False
            _logger.warning("%s: answers again", self._url)

    def _pause(self, attempts: int, asked: float | None) -> float:
        """Return the seconds until the next attempt: doubling, with up to a half more so that clients do not come
        all at once; as long as the server asked for, if it did."""
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempts - 1))
        return max(longest * (1 + self._jitter.random() / 2), asked or 0.0)

    async def _once(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[int, bytes, float | None]:
        """Return status, body and the seconds of `Retry-After`. Raises aiohttp's errors."""
        async with session.request(
            method,
            url,
            data=None if body is None else io.BytesIO(body),  # a large one is then sent in parts
            headers=headers,
            proxy=self._proxy,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        ) as response:
            data = bytearray()
            async for part in response.content.iter_any():
                data += part
                if len(data) > MOST_BYTES:
                    raise Refused(response.status, f"the answer is longer than {MOST_BYTES} bytes")
            return response.status, bytes(data), _seconds(response.headers.get("Retry-After"))


@cache
def _loop(_process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of all clients of a process, in a thread of its own: the caller's may run one already, as
    in notebooks, and a look-up of a name that hangs must not hold up the caller. A forked process has no such
    thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="http-client").start()
    return loop


def secret(variable: str, purpose: str) -> str:
    """Return the value of an environment variable. Raises ImageRLError when it is not set, or could not be a header."""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ImageRLError(f"set the environment variable {variable} to {purpose}")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ImageRLError(f"{variable} must hold {purpose}: printable ASCII without spaces")
    return value


def _proxy_for(url: str) -> str | None:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _seconds(retry_after: str | None) -> float | None:
    """Return `Retry-After` in seconds: a number of them, or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
        except (TypeError, ValueError):
            return None


def _message(data: bytes) -> str:
    """Say what is in an error's body, in one line."""
    text = data[:4000].decode(errors="replace")
    try:
        told = json.loads(text)["error"]
        text = told["message"] if isinstance(told, dict) else told
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return one_line(text, 300) or "without a word"


def _reason(error: BaseException) -> str:
    """Say why there was no answer, in the system's words where it has some."""
    number = getattr(error, "errno", None)
    # Below 0 it is of the look-up of a name, and TLS has numbers of its own.
    if isinstance(number, int) and number > 0 and not isinstance(error, aiohttp.ClientSSLError):
        return os.strerror(number)
    return f"{type(error).__name__}: {one_line(getattr(error, 'message', error), 200)}"
