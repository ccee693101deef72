"""HTTP with a time limit over all attempts: retries, back-off, `Retry-After`, and no answer without an end."""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import urllib3

from rl.types import ImageRLError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_S = 5.0
MOST_BYTES = 64 * 2**20  # of an answer


class Refused(Exception):
    """The server will not do it, however often it is asked. `status` is HTTP's; the message is the server's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class GaveUp(Exception):
    """No answer within the time; the message is the last thing that went wrong."""


class Answer(NamedTuple):
    body: bytes
    attempts: int


class Client:
    """Sends requests to one server. `token` is its bearer token. Safe to use from many threads.

    Proxies of the environment are used as usual, but never for this machine itself. Redirects are not followed: they
    would carry the token elsewhere."""

    def __init__(self, url: str, token: str | None, connections: int = 4, seed: int = 0) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._jitter = random.Random(seed)
        proxy = _proxy_for(url)
        self._pool: urllib3.PoolManager = (
            urllib3.ProxyManager(proxy, maxsize=connections)
            if proxy
            else urllib3.PoolManager(maxsize=connections)
        )

    def send(
        self,
        method: str,
        body: bytes | None,
        deadline: float,
        attempt_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to a request, tried until `deadline` (of `time.monotonic`), each time for `attempt_s` seconds.

        Raises Refused for a status that another attempt would not change, and GaveUp."""
        attempts = 0
        while True:
            attempts += 1
            asked = None
            try:
                end = min(deadline, time.monotonic() + attempt_s)
                status, data, asked = self._once(method, body, end, headers)
                if status == 200:
                    return Answer(data, attempts)
                problem = f"HTTP {status}: {_message(data)}"
                if status not in RETRIED:
                    raise Refused(status, problem)
            except (TimeoutError, urllib3.exceptions.ReadTimeoutError):
                problem = f"no answer within {attempt_s:g} s"
            except urllib3.exceptions.HTTPError as error:
                problem = _short(error)
            pause = self._pause(attempts, asked)
            if time.monotonic() + pause >= deadline:
                raise GaveUp(f"{problem} (tried {attempts} times)")
            time.sleep(pause)

    def _pause(self, attempts: int, asked: float | None) -> float:
        """Seconds until the next attempt: doubling, with up to a half more so that clients do not come all at once;
        as long as the server asked for, if it did."""
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempts - 1))
        return max(longest * (1 + self._jitter.random() / 2), asked or 0.0)

    def _once(
        self, method: str, body: bytes | None, end: float, headers: Mapping[str, str] | None
    ) -> tuple[int, bytes, float | None]:
        """Status, body and the seconds of `Retry-After`. Raises TimeoutError at `end` and urllib3's errors."""
        left = max(0.01, end - time.monotonic())
        response = self._pool.request(
            method,
            self._url,
            body=body,
            headers={**self._headers, **(headers or {})},
            timeout=urllib3.Timeout(connect=min(CONNECT_S, left), read=left),
            retries=False,
            redirect=False,
            preload_content=False,
        )
        try:
            data = bytearray()
            while part := response.read(2**16):
                data += part
                if len(data) > MOST_BYTES:
                    raise Refused(response.status, f"the answer is longer than {MOST_BYTES} bytes")
                if time.monotonic() > end:
                    raise TimeoutError
            response.release_conn()
            return response.status, bytes(data), _seconds(response.headers.get("Retry-After"))
        finally:
            response.close()


def secret(variable: str, purpose: str) -> str:
    """The value of an environment variable. Raises ImageRLError when it is not set, or could not be a header."""
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
    """`Retry-After` in seconds: a number of them, or a date."""
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
    """What an error's body says, in one line."""
    text = data[:4000].decode(errors="replace")
    try:
        told = json.loads(text)["error"]
        text = told["message"] if isinstance(told, dict) else told
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(str(text).split())[:300] or "without a word"


def _short(error: BaseException) -> str:
    """The cause of a failed connection, without the addresses of objects."""
    while error.__cause__ is not None or isinstance(error.__context__, OSError):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
