"""Scores requests in Ray actors, so that scoring overlaps with sampling, or in this process.

Each actor has one thread in the driver that hands it one call at a time. Thus a call's time-out starts when
the call does, a free actor takes the next call, and a dead or hanging actor holds up nobody but itself."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rewards.base import RewardSpec, check_reward, load_rewards, unique_labels
from rewards.mixing import Mix
from rewards.scoring import (
    RewardValues,
    call_reward,
    combine,
    concatenate,
    part_of,
)
from rl.types import ImageRLError, RewardRequest, RewardScores

NICENESS = 5  # an actor yields to the training process; it catches up while that one waits
ATTEMPTS = 2  # of one call, when the actor dies under it
START_TIMEOUT_S = 300.0  # loading models; downloads included
OBJECT_STORE_BYTES = 512 * 2**20  # of shared memory, for pictures under way; Ray spills to disk beyond


class _Actor:
    """Runs in a Ray process: holds the loaded rewards and calls one at a time."""

    def __init__(self, specs: Sequence[RewardSpec], folder: str) -> None:
        self._specs = specs
        os.nice(NICENESS)
        if os.path.isdir(folder):  # the driver's; a user's reward may open files relative to it
            os.chdir(folder)

    def load(self) -> str | None:
        """None when all rewards are loaded, else what the user has to mend."""
        try:
            self._rewards = load_rewards(self._specs)
        except ImageRLError as error:
            return str(error)
        return None

    def score(self, reward: int, request: RewardRequest) -> RewardValues | str:
        """What one reward says; a string is what the user has to mend."""
        try:
            return call_reward(self._rewards[reward], request)
        except ImageRLError as error:
            return str(error)


@dataclass(slots=True)
class _Call:
    reward: int
    label: str
    request: Any  # reference to a RewardRequest in Ray's object store
    size: int
    answer: Future[RewardValues]


class _Worker(threading.Thread):
    """Owns one actor: starts it, feeds it from the shared queue, replaces it when it dies or hangs."""

    def __init__(
        self, calls: queue.SimpleQueue[_Call | None], create: Any, timeout_s: float, max_restarts: int
    ) -> None:
        super().__init__(daemon=True, name="reward-worker")
        self.ready: Future[None] = Future()
        self._calls = calls
        self._create = create
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        self._restarts = 0  # since the last call that was answered
        self._actor: Any = None
        self._closing = False

    def run(self) -> None:
        try:
            self._start_actor()
            self.ready.set_result(None)
        except Exception as error:
            self.ready.set_exception(error)
        while (call := self._calls.get()) is not None:
            try:
                call.answer.set_result(self._answer(call))
            except Exception as error:
                call.answer.set_exception(error)

    def stop(self) -> None:
        """Ends the actor, also under a call. The thread ends at its next None."""
        self._closing = True
        self._kill_actor()

    def _start_actor(self) -> None:
        import ray

        self._actor = self._create()
        try:
            problem = ray.get(self._actor.load.remote(), timeout=START_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self._kill_actor()
            raise ImageRLError(
                f"a reward process did not start ({type(error).__name__}); try rewards.workers=0 to see why"
            ) from error
        if problem is not None:
            self._kill_actor()
            raise ImageRLError(problem)

    def _kill_actor(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor)

    def _answer(self, call: _Call) -> RewardValues:
        import ray

        for _ in range(ATTEMPTS):
            if self._actor is None:
                self._restart(call.label)
            try:
                values = ray.get(self._actor.score.remote(call.reward, call.request), timeout=self._timeout_s)
            except ray.exceptions.GetTimeoutError:
                self._kill_actor()
                return RewardValues.failed(
                    call.size, f"no answer within {self._timeout_s:g} s (rewards.timeout_s)"
                )
            except ray.exceptions.RayActorError:
                self._kill_actor()
                continue
            self._restarts = 0
            if isinstance(values, str):
                raise ImageRLError(values)
            return values
        return RewardValues.failed(call.size, f"the reward process died {ATTEMPTS} times on this call")

    def _restart(self, label: str) -> None:
        if self._closing:
            raise RuntimeError("the reward workers are closed")
        self._restarts += 1
        if self._restarts > self._max_restarts:
            raise ImageRLError(
                f"the process of reward {label!r} died or hung {self._restarts} times in a row; "
                "mend the reward (rewards.workers=0 shows it) or raise rewards.max_restarts"
            )
        self._start_actor()


@contextmanager
def _environment(**variables: str) -> Any:
    """Sets environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_ray(workers: int) -> bool:
    """Connects to the cluster of RAY_ADDRESS or starts one on loopback; True when it is ours to stop.

    Must be called from the main thread: Ray's processes die with the thread that started them."""
    if not os.environ.get("RAY_ADDRESS"):
        # Ray listens on every interface unless told, before its import, that there will be no other node.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="error", log_to_driver=False)
        return False
    # The last variable keeps GPUs visible to actors that reserve none.
    with _environment(
        OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"
    ):
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level="error",
            log_to_driver=False,
        )
    return True


def _shards(request: RewardRequest, count: int) -> list[RewardRequest]:
    """At most `count` parts of a request, each of whole groups, in order."""
    groups = len(request.prompts) // request.group_size
    count = max(1, min(count, groups))
    bounds = [round(i * groups / count) * request.group_size for i in range(count + 1)]
    return [part_of(request, slice(*bound)) for bound in pairwise(bounds)]


class RewardWorkers:
    """A `RewardScorer` over a recipe's list of rewards (`{name | import_path, weight, **settings}`).

    `workers` Ray actors hold all rewards each; 0 scores in this process, at once and without time-outs. A
    call (one reward on a part of a request) that takes longer than `timeout_s` is given up: its samples count
    as failures and its actor is replaced. A call whose actor dies is tried once more. `max_restarts` is per
    actor, in a row. Scores do not depend on the number of workers as long as a reward looks at no more than
    one group.

    Raises ImageRLError at once when a reward cannot be imported, does not take its settings, or asks for a
    column that is not in `columns` (names in the prompt set; None: not checked). Rewards are constructed in
    the background: `wait_until_ready` raises what goes wrong there, and so does the first `collect`."""

    def __init__(
        self,
        specs: Sequence[Mapping[str, Any] | RewardSpec],
        *,
        gold: Sequence[Mapping[str, Any] | RewardSpec] = (),
        workers: int = 1,
        timeout_s: float = 60.0,
        max_restarts: int = 3,
        columns: Iterable[str] | None = None,
    ) -> None:
        entries = [
            entry if isinstance(entry, RewardSpec) else RewardSpec.from_mapping(entry)
            for entry in (*specs, *gold)
        ]
        self._trained = len(specs)  # gold metrics stand behind the rewards
        if not specs:
            raise ImageRLError("rewards is empty; name at least one, for example rewards=[{name: ocr}]")
        self._specs = [entry.absolute() for entry in entries]
        names = None if columns is None else list(columns)
        self.labels = unique_labels([check_reward(spec, names) for spec in self._specs])
        self._mixes = [
            Mix(label, spec.weight, spec.gate) for label, spec in zip(self.labels, self._specs, strict=True)
        ]
        for mix in self._mixes:
            if mix.gate and mix.gate.by.partition("/")[0] not in self.labels[: self._trained]:
                raise ImageRLError(
                    f"the gate of reward {mix.label!r} asks for {mix.gate.by}, which is no reward"
                )
        self._tickets: dict[int, tuple[int, int, list[list[Future[RewardValues]]]]] = {}
        self._done: dict[int, RewardScores] = {}
        self._next = 0
        self._workers: list[_Worker] = []
        self._owns_ray = False
        self._local = load_rewards(self._specs) if workers == 0 else []
        if workers > 0:
            self._start(workers, timeout_s, max_restarts)

    def _start(self, workers: int, timeout_s: float, max_restarts: int) -> None:
        self._owns_ray = _start_ray(workers)
        import ray

        # Actors reserve no CPU of our own cluster: there is nothing else to schedule on it.
        remote = ray.remote(num_cpus=0 if self._owns_ray else 1, max_restarts=0)(_Actor)
        folder = os.getcwd()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._workers = [
            _Worker(self._calls, lambda: remote.remote(self._specs, folder), timeout_s, max_restarts)
            for _ in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        atexit.register(self.close)

    def wait_until_ready(self) -> None:
        """Returns when every actor has loaded its rewards. Raises ImageRLError when one cannot."""
        for worker in self._workers:
            worker.ready.result()

    def submit(self, request: RewardRequest, with_gold: bool = False) -> int:
        """Starts scoring whole groups and returns a ticket for `collect` (workers=0: scores them first).

        `with_gold` measures the gold metrics too. They become components and never enter a total."""
        ticket, self._next = self._next, self._next + 1
        used = len(self.labels) if with_gold else self._trained
        if not self._workers:
            values = [call_reward(reward, request) for reward in self._local[:used]]
            self._done[ticket] = self._combine(values, request.group_size, request.step)
            return ticket
        import ray

        answers: list[list[Future[RewardValues]]] = [[] for _ in self.labels[:used]]
        for shard in _shards(request, len(self._workers)):
            reference = ray.put(shard)
            for index, label in enumerate(self.labels[:used]):
                answer: Future[RewardValues] = Future()
                answers[index].append(answer)
                self._calls.put(_Call(index, label, reference, len(shard.prompts), answer))
        self._tickets[ticket] = (request.group_size, request.step, answers)
        return ticket

    def collect(self, ticket: int) -> RewardScores:
        """Waits for the scores of a ticket; each ticket once. Raises ImageRLError when a reward needs
        mending."""
        if ticket in self._done:
            return self._done.pop(ticket)
        group_size, step, answers = self._tickets.pop(ticket)
        values = [concatenate([answer.result() for answer in shards]) for shards in answers]
        return self._combine(values, group_size, step)

    def _combine(self, values: Sequence[RewardValues], group_size: int, step: int) -> RewardScores:
        trained = self._trained
        scores = combine(self._mixes[:trained], values[:trained], group_size, step)
        if len(values) > trained:
            measured = combine(self._mixes[trained:], values[trained:], group_size)
            scores.components |= measured.components
            scores.failures |= measured.failures
            scores.reasons |= measured.reasons
        return scores

    def close(self) -> None:
        """Ends all actors, and Ray if it was started here. Open tickets are lost. May be called twice."""
        workers, self._workers = self._workers, []
        for worker in workers:
            self._calls.put(None)
            worker.stop()
        for worker in workers:
            worker.join(timeout=5.0)
        if self._owns_ray:
            import ray

            self._owns_ray = False
            ray.shutdown()
        atexit.unregister(self.close)
