"""Rollouts by Ray actors, as the main process sees them: it cuts the work, feeds actors and replaces them.

Each actor has a thread here that hands it one piece at a time, so that a slow one keeps its own piece only and a dead
one's is drawn again: the same tokens, as random numbers belong to step, prompt and sample."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from imagerl.rl.engine.cluster import (
    actor_cpus,
    ended_part_of_ray,
    refuse_ended_ray,
    refuse_too_many_gpus,
)
from imagerl.rl.engine.engine import OLD
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.actors import Build, Piece, RolloutActor, Weights, moved, store_weights
from imagerl.rl.rollout.engine import with_pictures
from imagerl.rl.types import (
    FlowSampling,
    Prompt,
    RewardScorer,
    RewardScores,
    Rollout,
    RolloutGroup,
    StoredRequest,
)

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.engine.engine import Engine

ATTEMPTS = 3  # of one piece, when the actor dies under it
T = TypeVar("T")


class Drawn(NamedTuple):
    """A piece as it came back."""

    groups: list[RolloutGroup]
    tickets: list[int]  # of the scorer


class _Died(Exception):
    """Ray lost the actor, by whatever of its errors."""


class Worker(threading.Thread):
    """Owns one actor: starts it, feeds it from the shared queue, replaces it when it dies or hangs."""

    def __init__(
        self,
        pieces: queue.SimpleQueue[tuple[Piece, Future[Drawn]] | None],
        create: Callable[[], Any],
        build: Build,
        scorer: RewardScorer,
        timeout_s: float,
    ) -> None:
        super().__init__(daemon=True, name="rollout-worker")
        self.ready: Future[None] = Future()
        self._pieces = pieces
        self._create = create
        self._build = build
        self._scorer = scorer
        self._timeout_s = timeout_s
        self._actor: Any = None
        self._closing = False

    def run(self) -> None:
        try:
            self._start_actor()
            self.ready.set_result(None)
        except _Died as death:
            self.ready.set_exception(
                ImageRLError(
                    f"a rollout actor did not start ({death}); try rollout.workers=0 to see why, or fewer"
                )
            )
        except Exception as error:
            self.ready.set_exception(error)
        while (work := self._pieces.get()) is not None:
            try:
                work[1].set_result(self._drawn(work[0]))
            except Exception as error:
                work[1].set_exception(error)

    def stop(self) -> None:
        """End the actor, also while it draws, and one of the threads that share the queue."""
        self._closing = True
        self._pieces.put(None)
        self._kill_actor()

    def _drawn(self, piece: Piece) -> Drawn:
        death = None
        for _ in range(ATTEMPTS):
            if self._closing:
                raise RuntimeError("the rollout workers are closed")
            try:
                if self._actor is None:
                    self._start_actor()
                return self._draw(piece)
            except _Died as error:
                death = error
        raise ImageRLError(
            f"a rollout actor died {ATTEMPTS} times on the same {len(piece.prompts)} prompts of step {piece.step + 1} "
            f"({death}); lower rollout.sample_chunk or the number of rollout.workers, and continue with --resume"
        )

    def _draw(self, piece: Piece) -> Drawn:
        """Have the actor draw, and hand its requests to the scorer as they come."""
        groups: list[RolloutGroup] = []
        tickets: list[int] = []
        stream = self._actor.draw.remote(piece)
        while (count := self._get(self._next(stream))) is not None:
            parts = [self._next(stream) for _ in range(count)]
            head = self._get(self._next(stream))
            if head is None:
                raise self._death("the stream of its groups broke off")
            if head.version != piece.weights.version:
                raise ImageRLError(
                    f"a rollout actor drew by the weights of version {head.version} where {piece.weights.version} "
                    "was asked for; continue with --resume"
                )
            groups += head.groups
            tickets.append(self._scorer.submit(StoredRequest(parts, head.sizes, head.group_size, piece.step)))
        return Drawn(groups, tickets)

    # ---- the actor -------------------------------------------------------------------------------------------

    def _start_actor(self) -> None:
        """Start an actor and have it load the model. Raises _Died, and ImageRLError for what must be mended."""
        refuse_ended_ray()
        self._actor = self._create()
        self._get(self._actor.load.remote(self._build))

    def _kill_actor(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized() and ended_part_of_ray() is None:
            ray.kill(actor)

    def _death(self, why: str) -> _Died:
        self._kill_actor()
        refuse_ended_ray()
        return _Died(why)

    def _next(self, stream: Any) -> Any:
        """Return a reference to the next that an actor yields, None after the last."""
        import ray

        refuse_ended_ray()
        ready, _ = ray.wait([stream], timeout=self._timeout_s, fetch_local=False)
        if not ready:
            raise self._death(f"no answer within {self._timeout_s:g} s, engine.timeout_s")
        return next(stream, None)

    def _get(self, reference: Any) -> Any:
        """Fetch what an actor says; None for no reference. Raises ImageRLError for what must be mended, and _Died."""
        import ray

        if reference is None:
            return None
        try:
            said = ray.get(reference, timeout=self._timeout_s)
        except ray.exceptions.RayTaskError:
            raise  # a fault of ours, told whole
        except ray.exceptions.RayError as error:
            raise self._death(type(error).__name__) from error
        if isinstance(said, str):
            raise ImageRLError(said)
        return said


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
        self._pieces: queue.SimpleQueue[tuple[Piece, Future[Drawn]] | None] = queue.SimpleQueue()
        self._begun: dict[int, list[tuple[Piece, Future[Drawn]]]] = {}  # by step
        self._own: dict[int, tuple[int, Sequence[Prompt]]] = {}  # version and this process's prompts, by step
        self._workers: list[Worker] = []
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
            worker = Worker(self._pieces, create, build, self.scorer, self.recipe.engine.timeout_s)
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
        prompts = {prompt.index: prompt for prompt in asked}
        own = [
            replace(moved(group, self.engine.device), prompt=with_pictures(prompts[group.prompt.index]))
            for group in shared
        ]
        self.engine.leave_cores(self.recipe.rewards.workers)
        return Rollout(own, version, lambda: self.engine.on_main(scores)[self.engine.rank])

    def published(self) -> tuple[int, Mapping[str, Tensor]]:
        return self._version, self._whole

    def close(self) -> None:
        """End all actors; what they draw is lost. May be called twice."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(timeout=5.0)


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
