"""Call a reward behind HTTP: `imagerl reward serve`, or anything that speaks `rewards.boundary.wire`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence

from imagerl.rewards.boundary.client import Answer, Client, GaveUp, Refused, secret
from imagerl.rewards.boundary.guard import failed, join
from imagerl.rewards.boundary.wire import Reply, WireError, pack_request, unpack_reply
from imagerl.rewards.pictures import to_quick_png
from imagerl.rl.types import ImageRLError, RewardOutput

TOKEN_ENV = "IMAGERL_REWARD_TOKEN"
CONTENT_TYPE = "application/vnd.imagerl.score"
MENDED_BY_USER = (401, 403, 404, 405, 422)


class RemoteReward:
    """Sends pictures to `url` and returns what comes back.

    At most `batch` pictures go at a time, samples of one prompt always together. An attempt has `timeout_s` seconds,
    all attempts of one call `patience_s`; what has no answer then is NaN, with the reason. The token is read from the
    environment variable `token_env`. The server is asked once at the start what it is.

    Raises ImageRLError when it cannot be reached then, refuses the token, or says that something must be mended."""

    def __init__(
        self,
        url: str,
        token_env: str = TOKEN_ENV,
        batch: int = 32,
        timeout_s: float = 30.0,
        patience_s: float = 48.0,
    ) -> None:
        if batch < 1 or timeout_s <= 0 or patience_s <= 0:
            raise ImageRLError(f"reward {url}: batch, timeout_s and patience_s must be positive")
        self._prefix = f"reward {url}: "
        self._batch = batch
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._client = Client(url, secret(token_env, f"the token of {url}"))
        try:
            answer = self._client.send("GET", None, time.monotonic() + patience_s, timeout_s)
            told = json.loads(answer.body)
            self.parameters = [str(name) for name in told["parameters"]]
        except GaveUp as error:
            raise ImageRLError(
                f"reward {url} cannot be reached: {error}; start it there with imagerl reward serve"
            ) from error
        except Refused as error:
            raise ImageRLError(f"reward {url} refuses: {error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ImageRLError(f"{url} is no reward: it does not say which parameters it has") from error

    def __call__(
        self,
        *,
        prompts: list[str],
        completions: list[list[int]],
        images: Sequence[object],
        completion_ids: object = None,
        **columns: list[object],
    ) -> RewardOutput:
        deadline = time.monotonic() + self._patience_s
        replies = []
        for part in batches(prompts, self._batch):
            try:
                body = pack_request(
                    prompts[part],
                    completions[part],
                    images[part],
                    {name: values[part] for name, values in columns.items()},
                    to_quick_png,
                )
            except WireError as error:
                raise ImageRLError(f"{self._prefix}{error}") from error
            reply, attempts = self._ask(body, part.stop - part.start, deadline)
            if attempts > 1:
                reply.breakdown["retries"] = [float(attempts - 1)] * len(reply.rewards)
            replies.append(reply)
        return RewardOutput(*join(replies))

    @property
    def grouped(self) -> bool:
        """Tell whether it compares the samples of a group."""
        return "groups" in self.parameters

    def _ask(self, body: bytes, size: int, deadline: float) -> tuple[Reply, int]:
        """Return the server's reply for one batch, and the attempts it took."""
        try:
            answer = self._send(body, deadline)
            return unpack_reply(answer.body, size), answer.attempts
        except Refused as error:
            if error.status in MENDED_BY_USER:
                words = error.words if error.status == 422 else str(error)
                raise ImageRLError(f"{self._prefix}{words}") from error
            reason = str(error)
        except (GaveUp, WireError) as error:
            reason = str(error)
        return failed(size, f"{self._prefix}{reason}"), 1

    def _send(self, body: bytes, deadline: float) -> Answer:
        return self._client.send("POST", body, deadline, self._timeout_s, {"Content-Type": CONTENT_TYPE})


def batches(prompts: Sequence[str], size: int) -> Iterator[slice]:
    """Return consecutive parts of at most `size` samples, cut where the prompt changes; longer groups stay whole."""
    start = end = 0
    while end < len(prompts):
        stop = end + 1
        while stop < len(prompts) and prompts[stop] == prompts[end]:
            stop += 1
        if end > start and stop - start > size:
            yield slice(start, end)
            start = end
        end = stop
    if end > start:
        yield slice(start, end)
