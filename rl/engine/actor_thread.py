"""Threads of this process that own one Ray actor each and hand it one piece of work at a time.

Thus a time-out starts when the actor does, a free actor takes the next piece, and a dead or hanging one holds up nobody
but itself."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from imagerl.rl.engine.cluster import ended_part_of_ray, refuse_ended_ray, wait_for_ray
from imagerl.rl.errors import ImageRLError

Work = TypeVar("Work")
Answer = TypeVar("Answer")


class ActorLost(Exception):
    """Ray lost an actor, by whatever of its errors, or the actor gave no answer in time: it `hung`."""

    def __init__(self, why: str, hung: bool = False) -> None:
        super().__init__(why)
        self.hung = hung


class ActorThread(threading.Thread, ABC, Generic[Work, Answer]):
    """Owns one actor: starts it, feeds it from a queue that several threads share, replaces it when it is lost.

    `ready` tells when the first actor has loaded, and raises what has to be mended before one can."""

    attempts: int  # of one piece of work, when an actor is lost under it
    timeout_key: str  # of the recipe

    def __init__(
        self,
        jobs: queue.SimpleQueue[tuple[Work, Future[Answer]] | None],
        create: Callable[[], object],
        timeout_s: float,
    ) -> None:
        super().__init__(daemon=True, name=type(self).__name__)
        self.ready: Future[None] = Future()
        self.actor: Any = None
        self.timeout_s = timeout_s
        self._jobs = jobs
        self._create = create
        self._closing = False

    @abstractmethod
    def load(self) -> None:
        """Have a new actor load what it works with."""

    @abstractmethod
    def do(self, work: Work) -> Answer:
        """Have the actor do a piece of work."""

    @abstractmethod
    def give_up(self, work: Work, lost: ActorLost) -> Answer:
        """Answer for work under which `attempts` actors were lost, `lost` the last, or raise ImageRLError."""

    @abstractmethod
    def not_started(self, lost: ActorLost) -> str:
        """Tell the user that the first actor was lost while it loaded."""

    def meaning(self, error: Exception) -> Exception:
        """Return what an error of Ray means: ActorLost, or the error itself where it is a fault of ours."""
        import ray

        return error if isinstance(error, ray.exceptions.RayTaskError) else ActorLost(type(error).__name__)

    def run(self) -> None:
        try:
            self._start_actor()
            self.ready.set_result(None)
        except ActorLost as lost:
            self.ready.set_exception(ImageRLError(self.not_started(lost)))
        except Exception as error:
            self.ready.set_exception(error)
        while (job := self._jobs.get()) is not None:
            work, answer = job
            try:
                answer.set_result(self.answer(work))
            except Exception as error:
                answer.set_exception(error)

    def answer(self, work: Work) -> Answer:
        """Have a piece of work done, by a new actor where one is lost."""
        for left in reversed(range(self.attempts)):
            try:
                if self.actor is None:
                    self._start_actor()
                return self.do(work)
            except ActorLost as lost:
                if not left:
                    return self.give_up(work, lost)
        raise AssertionError("attempts are at least one")

    def ask(self, reference: Any, timeout_s: float | None = None) -> Any:
        """Return what the actor says, after `timeout_s` at most, the thread's own by default. Raises ImageRLError where
        it says in words what has to be mended, and what `meaning` makes of Ray's errors."""
        import ray

        patience = self.timeout_s if timeout_s is None else timeout_s
        if not wait_for_ray(reference, patience):
            raise self.lose(patience)
        try:
            said = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.kill_actor()
            refuse_ended_ray()
            raise self.meaning(error) from error
        if isinstance(said, str):
            raise ImageRLError(said)
        return said

    def lose(self, patience_s: float) -> ActorLost:
        """End an actor that has not answered, and say so."""
        self.kill_actor()
        refuse_ended_ray()
        return ActorLost(f"no answer within {patience_s:g} s, {self.timeout_key}", hung=True)

    def kill_actor(self) -> None:
        """End the actor, if there is one."""
        import ray

        actor, self.actor = self.actor, None
        if actor is not None and ray.is_initialized() and ended_part_of_ray() is None:
            ray.kill(actor)

    def stop(self) -> None:
        """End the actor, also while it works, and one of the threads that share the queue, at its next piece."""
        self._closing = True
        self._jobs.put(None)
        self.kill_actor()

    def _start_actor(self) -> None:
        """Start an actor and have it load. Raises ActorLost, and ImageRLError for what has to be mended."""
        if self._closing:
            raise RuntimeError(f"{self.name} is closed")
        refuse_ended_ray()
        self.actor = self._create()
        try:
            self.load()
        except ImageRLError:
            self.kill_actor()
            raise


def stop_all(threads: Sequence[ActorThread[Any, Any]]) -> None:
    """End actors and their threads; what they work on is lost."""
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join(timeout=5.0)
