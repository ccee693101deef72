"""Rollouts by Ray actors, as the main process sees them: it cuts the work, feeds actors and replaces them.

A slow actor keeps its own piece only, and a dead one's is drawn again: the same tokens, as random numbers belong to
step, prompt and sample."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from imagerl.rl.engine.actor_thread import ActorLost, ActorThread, stop_all
from imagerl.rl.engine.cluster import actor_cpus, refuse_ended_ray, refuse_too_many_gpus, wait_for_ray
from imagerl.rl.engine.engine import OLD
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.actors import Build, Head, Judged, Piece, RolloutActor, Weights, moved, store_weights
from imagerl.rl.rollout.engine import Rollout, RolloutEngine, with_pictures
from imagerl.rl.types import (
    FlowSampling,
    Prompt,
    RewardScorer,
    RewardScores,
    RolloutGroup,
    Source,
    StoredRequest,
)

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.engine.engine import Engine

T = TypeVar("T")


class Drawn(NamedTuple):
    """A piece as it came back."""

    groups: list[RolloutGroup]
    tickets: list[int]  # of the scorer


Pieces = queue.SimpleQueue[tuple[Piece, Future[Drawn]] | None]


class RolloutThread(ActorThread[Piece, Drawn]):
    """Feeds an actor that draws, and hands its requests to the scorer as they come."""

    attempts = 3
    timeout_key = "engine.timeout_s"

    def __init__(
        self,
        pieces: Pieces,
        create: Callable[[], object],
        build: Build,
        scorer: RewardScorer,
        timeout_s: float,
    ) -> None:
        super().__init__(pieces, create, timeout_s)
        self._build = build
        self._scorer = scorer

    def load(self) -> None:
        self.ask(self.actor.load.remote(self._build))

    def do(self, work: Piece) -> Drawn:
        groups: list[RolloutGroup] = []
        tickets: list[int] = []
        stream = self.actor.draw.remote(work)
        while (count := self._next(stream)) is not None:
            parts = [self._next(stream) for _ in range(self.ask(count))]
            head = self._next(stream)
            if head is None:
                self.kill_actor()
                raise ActorLost("the stream of its groups broke off")
            told: Head = self.ask(head)
            if told.version != work.weights.version:
                raise ImageRLError(
                    f"a rollout actor drew by the weights of version {told.version} where {work.weights.version} "
                    "was asked for; continue with --resume"
                )
            groups += told.groups
            if parts:
                request = StoredRequest(parts, told.sizes, told.group_size, work.step)
                tickets.append(self._scorer.submit(request))
        return Drawn(groups, tickets)

    def give_up(self, work: Piece, lost: ActorLost) -> Drawn:
        raise ImageRLError(
            f"a rollout actor died {self.attempts} times on the same {len(work.prompts)} prompts of "
            f"{work.occasion} ({lost}); lower rollout.sample_chunk or the number of rollout.workers, and continue with "
            "--resume"
        )

    def not_started(self, lost: ActorLost) -> str:
        return f"a rollout actor did not start ({lost}); try rollout.workers=0 to see why, or fewer"

    def _next(self, stream: Any) -> Any:
        """Return a reference to the next that an actor yields, None after the last."""
        if not wait_for_ray(stream, self.timeout_s):
            raise self.lose(self.timeout_s)
        return next(stream, None)


class RayRollouts:
    """Implements `Rollouts` by `rollout.workers` Ray actors. The main process alone knows them: it draws for all
    processes, whose prompts it is told, and tells them their groups and scores.

    `build` is called in each actor. Pieces are of `rollout.sample_chunk` prompts; without it a step is cut evenly among
    the actors, so that their number may then move roundings."""

    def __init__(self, recipe: Recipe, build: Build, scorer: RewardScorer, engine: Engine) -> None:
        """Begin to start the actors, on the Ray that is running."""
        self.recipe = recipe
        self.scorer = scorer
        self.engine = engine
        self._version = -1
        self._weights: Weights | None = None  # on the main process, from here on
        self._whole: Mapping[str, Tensor] = {}
        self._pieces: Pieces = queue.SimpleQueue()
        self._begun: dict[int, list[tuple[Piece, Future[Drawn]]]] = {}  # by step
        self._own: dict[int, tuple[int, Sequence[Prompt]]] = {}  # version and this process's prompts, by step
        self._workers: list[RolloutThread] = []
        self._judged: list[Weights] = []  # on the main process: one, once there was an evaluation
        self._judged_after: int | None = None  # updates
        engine.on_main(partial(self._start_workers, build))

    def _start_workers(self, build: Build) -> None:
        import ray

        settings = self.recipe.rollout
        gpus = settings.num_gpus
        if gpus is None:
            gpus = 1.0 if self.engine.device.type == "cuda" else 0.0
        refuse_too_many_gpus(gpus * settings.workers, "rollout.workers")
        actor = ray.remote(num_cpus=actor_cpus(), num_gpus=gpus, max_restarts=0)(RolloutActor)
        create = partial(actor.remote, os.getcwd())
        for _ in range(settings.workers):
            worker = RolloutThread(self._pieces, create, build, self.scorer, self.recipe.engine.timeout_s)
            self._workers.append(worker)
            worker.start()

    def wait_until_ready(self) -> None:
        def wait() -> None:
            for worker in self._workers:
                worker.ready.result()

        self.engine.on_main(wait)

    def publish(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        if version == self._version:
            return
        self._version = version
        if weights is None:
            state = self.engine.state_dict(moments=False)
            weights = state["model"] | state.get(OLD, {})
        whole = weights

        def store() -> None:
            refuse_ended_ray()
            self._weights = store_weights(version, whole)
            self._whole = whole if self.recipe.rollout.max_staleness else {}  # for checkpoints

        self.engine.on_main(store)

    def start(self, step: int, prompts: Sequence[Prompt], flow: FlowSampling | None) -> None:
        self._own[step] = self._version, prompts
        everyone = self.engine.gather_objects(list(prompts))
        if self.engine.is_main:
            assert self._weights is not None  # published before
            cut = pieces(self.recipe, everyone, step, flow, self._weights)
            work = [(piece, Future[Drawn]()) for piece in cut]
            self._begun[step] = work
            for each in work:
                self._pieces.put(each)

    def collect(self, step: int) -> Rollout:
        drawn: list[tuple[int, Drawn]] = []  # by rank, on the main process

        def groups() -> list[list[RolloutGroup]]:
            drawn.extend((piece.rank, answer.result()) for piece, answer in self._begun.pop(step))
            return by_rank(((rank, each.groups) for rank, each in drawn), self.engine.world_size)

        def scores() -> list[list[RewardScores]]:
            found = ((rank, [self.scorer.collect(ticket) for ticket in each.tickets]) for rank, each in drawn)
            return by_rank(found, self.engine.world_size)

        shared = self.engine.on_main(groups)[self.engine.rank]
        version, asked = self._own.pop(step)
        own = self._restored(shared, asked)
        self.engine.leave_cores(self.recipe.rewards.workers)
        return Rollout(own, version, lambda: self.engine.on_main(scores)[self.engine.rank])

    def _restored(self, groups: Iterable[RolloutGroup], asked: Sequence[Prompt]) -> list[RolloutGroup]:
        """Bring groups to this device, and give them back their whole prompts."""
        prompts = {prompt.index: prompt for prompt in asked}
        return [
            replace(moved(group, self.engine.device), prompt=with_pictures(prompts[group.prompt.index]))
            for group in groups
        ]

    def judged(self, engine: RolloutEngine) -> Source:
        updates = self.engine.updates
        if self._judged_after != updates:  # once for all temperatures
            model = self.engine.state_dict(moments=False)["model"]
            self._judged.clear()  # to make room
            version = -2 - updates  # no step's
            self.engine.on_main(lambda: self._judged.append(store_weights(version, model)))
            self._judged_after = updates
        return JudgedByActors(self, engine, self._judged)

    def draw_judged(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        chunk: int | None,
        judged: Judged,
        weights: Sequence[Weights],
    ) -> Iterator[list[RolloutGroup]]:
        """Yield the groups of `chunk` of this process's prompts at a time. Collective, as often as the process with the
        most prompts has such chunks."""
        everyone = self.engine.gather_objects(list(prompts))
        size = chunk or max(1, *map(len, everyone))
        work: dict[tuple[int, int], Future[Drawn]] = {}  # by rank and first prompt, on the main process
        for rank, own in enumerate(everyone if self.engine.is_main else ()):
            for first in range(0, len(own), size):
                asked = own[first : first + size]
                work[rank, first] = Future()
                piece = Piece(rank, 0, 0, asked, group_size, None, None, False, 0, weights[0], judged)
                self._pieces.put((piece, work[rank, first]))
        for first in range(0, max(map(len, everyone)), size):

            def drawn(first: int = first) -> list[list[RolloutGroup]]:
                found = (work.get((rank, first)) for rank in range(len(everyone)))
                return [answer.result().groups if answer else [] for answer in found]

            groups = self._restored(self.engine.on_main(drawn)[self.engine.rank], prompts)
            for _, alike in groupby(groups, lambda group: group.images.shape):
                yield list(alike)

    def published(self) -> tuple[int, Mapping[str, Tensor]]:
        return self._version, self._whole

    def close(self) -> None:
        """End all actors; what they draw is lost. May be called twice."""
        workers, self._workers = self._workers, []
        stop_all(workers)


@dataclass(frozen=True, slots=True)
class JudgedByActors:
    """Draws pictures that are judged on the actors, as `engine` would in this process. Collective."""

    rollouts: RayRollouts
    engine: RolloutEngine
    weights: Sequence[Weights]  # on the main process

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        judged = Judged(self.engine.sampling, self.engine.seed, str(occasion))
        return self.rollouts.draw_judged(prompts, group_size, sample_chunk, judged, self.weights)


def pieces(
    recipe: Recipe,
    everyone: Sequence[Sequence[Prompt]],
    step: int,
    flow: FlowSampling | None,
    weights: Weights,
) -> Iterator[Piece]:
    """Cut the prompts of every process into pieces, none of which is of two."""
    settings = recipe.rollout
    for rank, prompts in enumerate(everyone):
        even = -(-len(prompts) * len(everyone) // settings.workers)  # prompts an actor
        size = settings.sample_chunk or max(1, min(even, len(prompts)))
        for first in range(0, len(prompts), size):
            yield Piece(
                rank,
                step,
                recipe.run.steps,
                prompts[first : first + size],
                settings.group_size,
                settings.decode_chunk,
                flow,
                recipe.monitors.pictures,
                recipe.rewards.workers,
                weights,
            )


def by_rank(parts: Iterable[tuple[int, list[T]]], ranks: int) -> list[list[T]]:
    """Join lists that belong to ranks."""
    joined: list[list[T]] = [[] for _ in range(ranks)]
    for rank, part in parts:
        joined[rank] += part
    return joined
