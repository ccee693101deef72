"""Scores requests in Ray actors, so that scoring overlaps with sampling, or in this process."""

from __future__ import annotations

import atexit
import os
import queue
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count, pairwise

from imagerl.rewards.base import RewardSpec, check_reward, load_rewards, load_spec, secrets_of, unique_labels
from imagerl.rewards.boundary.guard import join
from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.mixing import Mix
from imagerl.rewards.workers.actors import Call, Plan, RewardThread, actor_class, refuse_unsendable
from imagerl.rewards.workers.scoring import call_reward, combine, part_of
from imagerl.rl.engine.actor_thread import stop_all
from imagerl.rl.engine.cluster import (
    cluster_address,
    refuse_ended_ray,
    refuse_too_many_gpus,
    start_ray,
    stop_ray,
)
from imagerl.rl.types import ImageRLError, RewardRequest, RewardScores, StoredRequest

Calls = queue.SimpleQueue[tuple[Call, Future[Reply]] | None]
PATIENCE = 0.8  # of a call's time, after which a reward that waits for others must have given up


def _by_actor(specs: Sequence[RewardSpec]) -> list[list[int]]:
    """Return the places of the rewards that can share an actor: one that reserves GPUs has its own."""
    together: dict[str, list[int]] = {}
    for place, spec in enumerate(specs):
        together.setdefault(repr((spec.runtime_env, place if spec.num_gpus else None)), []).append(place)
    return list(together.values())


def _shards(request: RewardRequest, count: int) -> list[RewardRequest]:
    """Cut a request into at most `count` parts, each of whole groups, in order."""
    groups = len(request.prompts) // request.group_size
    count = max(1, min(count, groups))
    bounds = [round(i * groups / count) * request.group_size for i in range(count + 1)]
    return [part_of(request, slice(*bound)) for bound in pairwise(bounds)]


def store(request: RewardRequest, count: int) -> StoredRequest:
    """Put a request into Ray's object store, cut into at most `count` parts. Raises ImageRLError when Ray is gone."""
    import ray

    refuse_ended_ray()
    parts = _shards(request, count)
    sizes = [len(part.prompts) for part in parts]
    return StoredRequest([ray.put(part) for part in parts], sizes, request.group_size, request.step)


def read_entries(entries: Iterable[Mapping[str, object] | RewardSpec]) -> list[RewardSpec]:
    """Read entries of a recipe's lists as specs that mean the same in every process."""
    return [
        (entry if isinstance(entry, RewardSpec) else RewardSpec.from_mapping(entry)).absolute()
        for entry in entries
    ]


class RewardWorkers:
    """A `RewardScorer` over a recipe's list of rewards (`{name | import_path, weight, **settings}`).

    `workers` Ray actors hold all rewards each, and further ones those of each `runtime_env` and each that reserves
    `num_gpus`; 0 scores in this process, at once and without time-outs. A call (one reward on a part of a request) that
    takes longer than `timeout_s` is given up: its samples count as failures and its actor is replaced. A call whose
    actor dies is tried once more. `max_restarts` is per actor, in a row. Scores do not depend on the number of workers
    as long as a reward looks at no more than one group. A reward that names `policy` gets it, where `workers` is 0.

    Raises ImageRLError at once when a reward cannot be imported, does not take its settings, or asks for a
    column that is not in `columns` (names in the prompt set; None: not checked). Rewards are constructed in
    the background: `wait_until_ready` raises what goes wrong there, and so does the first `collect`."""

    def __init__(
        self,
        specs: Sequence[Mapping[str, object] | RewardSpec],
        *,
        gold: Sequence[Mapping[str, object] | RewardSpec] = (),
        workers: int = 1,
        timeout_s: float = 60.0,
        max_restarts: int = 3,
        columns: Iterable[str] | None = None,
        policy: object = None,
    ) -> None:
        self._trained = len(specs)  # gold metrics stand behind the rewards
        if not specs:
            raise ImageRLError("rewards is empty; name at least one, for example rewards=[{name: ocr}]")
        names = None if columns is None else list(columns)
        self._specs = read_entries((*specs, *gold))
        self.labels = unique_labels([check_reward(spec, names) for spec in self._specs])
        self._mixes = [
            Mix(label, spec.weight, spec.gate, spec.half)
            for label, spec in zip(self.labels, self._specs, strict=True)
        ]
        for key in ("runtime_env", "num_gpus"):
            if workers == 0 and any(getattr(spec, key) for spec in self._specs):
                raise ImageRLError(f"{key} needs rewards.workers of 1 or more: it is that of a Ray actor")
        for mix in self._mixes:
            if mix.gate and mix.gate.by.partition("/")[0] not in self.labels[: self._trained]:
                raise ImageRLError(
                    f"the gate of reward {mix.label!r} asks for {mix.gate.by}, which is no reward"
                )
        self._tickets: dict[int, tuple[int, int, list[list[Future[Reply]]]]] = {}
        self._done: dict[int, RewardScores] = {}
        self._waiting: dict[
            int, tuple[StoredRequest, int]
        ] = {}  # to be scored here, where there are no actors
        self._numbers = count()  # of tickets; several threads may submit
        self._workers: list[RewardThread] = []
        self._owns_ray = False
        self._shards = workers
        self._local = load_rewards(self._specs, PATIENCE * timeout_s, names, policy) if workers == 0 else []
        if workers > 0:
            self._start(workers, timeout_s, max_restarts, names)

    def _start(self, workers: int, timeout_s: float, max_restarts: int, columns: list[str] | None) -> None:
        if cluster_address() is None:  # else actors may reach what this machine does not
            for spec in self._specs:
                if spec.asks_server and not spec.is_isolated:
                    load_spec(
                        spec, PATIENCE * timeout_s, columns
                    )  # what an actor says of a dead one is not seen
        for label, spec in zip(self.labels, self._specs, strict=True):
            if spec.function is not None:
                refuse_unsendable(label, spec.function)
        self._owns_ray = start_ray(workers)
        refuse_too_many_gpus(workers * sum(spec.num_gpus for spec in self._specs), "the rewards")
        self._calls: dict[int, Calls] = {}  # by place of the reward
        secrets = {name for spec in self._specs for name in secrets_of(spec) if name in os.environ}
        for places in _by_actor(self._specs):
            calls: Calls = queue.SimpleQueue()
            self._calls |= dict.fromkeys(places, calls)
            plan = Plan(
                {place: self._specs[place] for place in places},
                columns,
                PATIENCE * timeout_s,
                os.getcwd(),
                {name: os.environ[name] for name in secrets},
            )
            labels = {place: self.labels[place] for place in places}
            actor = actor_class(self._specs[places[0]].num_gpus, self._specs[places[0]].runtime_env)
            self._workers += [
                RewardThread(calls, partial(actor.remote, plan), labels, timeout_s, max_restarts)
                for _ in range(workers)
            ]
        for worker in self._workers:
            worker.start()
        atexit.register(self.close)

    def wait_until_ready(self) -> None:
        """Return when every actor has loaded its rewards. Raises ImageRLError when one cannot."""
        for worker in self._workers:
            worker.ready.result()

    def submit(self, request: RewardRequest | StoredRequest, with_gold: bool = False) -> int:
        """Start scoring whole groups and return a ticket for `collect` (workers=0: scores them first, or those in
        Ray's store when they are collected).

        `with_gold` measures the gold metrics too. They become components and never enter a total."""
        ticket = next(self._numbers)
        used = len(self.labels) if with_gold else self._trained
        if not self._workers:
            if isinstance(request, StoredRequest):
                self._waiting[ticket] = request, used
            else:
                values = [call_reward(reward, request) for reward in self._local[:used]]
                self._done[ticket] = self._combine(values, request.group_size, request.step)
            return ticket
        stored = request if isinstance(request, StoredRequest) else store(request, self._shards)
        answers: list[list[Future[Reply]]] = [[] for _ in self.labels[:used]]
        for reference, size in zip(stored.parts, stored.sizes, strict=True):
            for index, label in enumerate(self.labels[:used]):
                answer: Future[Reply] = Future()
                answers[index].append(answer)
                self._calls[index].put((Call(index, label, reference, size), answer))
        self._tickets[ticket] = (stored.group_size, stored.step, answers)
        return ticket

    def collect(self, ticket: int) -> RewardScores:
        """Wait for the scores of a ticket; each ticket once. Raises ImageRLError when a reward needs mending."""
        if ticket in self._done:
            return self._done.pop(ticket)
        if ticket in self._waiting:
            import ray

            request, used = self._waiting.pop(ticket)
            parts = [ray.get(part) for part in request.parts]
            here = [join([call_reward(reward, part) for part in parts]) for reward in self._local[:used]]
            return self._combine(here, request.group_size, request.step)
        group_size, step, answers = self._tickets.pop(ticket)
        values = [join([answer.result() for answer in shards]) for shards in answers]
        return self._combine(values, group_size, step)

    def _combine(self, values: Sequence[Reply], group_size: int, step: int) -> RewardScores:
        trained = self._trained
        scores = combine(self._mixes[:trained], values[:trained], group_size, step)
        if len(values) > trained:
            measured = combine(self._mixes[trained:], values[trained:], group_size)
            scores.components |= measured.components
            scores.failures |= measured.failures
            scores.reasons |= measured.reasons
        return scores

    def close(self) -> None:
        """End all actors, and Ray if it was started here. Open tickets are lost. May be called twice."""
        workers, self._workers = self._workers, []
        stop_all(workers)
        if self._owns_ray:
            self._owns_ray = False
            stop_ray()
        atexit.unregister(self.close)
