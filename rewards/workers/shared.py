"""One pool of reward workers for all processes of a run: an actor holds it, every process hands requests to that."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar

from imagerl.rewards.base import secrets_of
from imagerl.rewards.workers.pool import RewardWorkers, read_entries, store
from imagerl.rl.engine.cluster import (
    cluster_address,
    ended_part_of_ray,
    how_to_join,
    join_ray,
    refuse_ended_ray,
    start_ray,
    stop_ray,
    wait_for_ray,
)
from imagerl.rl.types import ImageRLError, RewardRequest, RewardScores, StoredRequest

T = TypeVar("T")
AT_ONCE = 256  # requests that the pool waits for; further ones queue
NAMESPACE = "imagerl"  # of the pool's name on the cluster


class Processes(Protocol):
    """The processes that share a pool: a `rl.engine.engine.Engine`."""

    is_main: bool

    def on_main(self, action: Callable[[], T]) -> T: ...

    def gather_objects(self, value: int) -> list[int]: ...


class PoolActor:
    """Runs in a Ray process: holds the workers and waits for them."""

    def __init__(self, folder: str, secrets: Mapping[str, str]) -> None:
        os.environ.update(secrets)
        if os.path.isdir(folder):
            os.chdir(folder)

    def open(self, settings: Mapping[str, Any]) -> str | None:
        """Start the workers and wait until they are ready; return None, or what the user has to mend."""
        try:
            self._workers = RewardWorkers(**settings)
            self._workers.wait_until_ready()
        except ImageRLError as error:
            return str(error)
        return None

    def score(self, request: StoredRequest, with_gold: bool) -> RewardScores | str:
        """Score a request; a string is what the user has to mend."""
        try:
            return self._workers.collect(self._workers.submit(request, with_gold))
        except ImageRLError as error:
            return str(error)


class SharedRewards:
    """A `RewardScorer` of each process of a run, over the one pool of `RewardWorkers` that the main process starts,
    with `workers` of 1 or more. Making one is collective."""

    def __init__(
        self,
        processes: Processes,
        specs: Sequence[Mapping[str, object]],
        *,
        gold: Sequence[Mapping[str, object]],
        workers: int,
        timeout_s: float,
        max_restarts: int,
        columns: Iterable[str],
    ) -> None:
        """Raises ImageRLError, on all processes, where Ray cannot be had or a reward needs mending."""
        self._is_main = processes.is_main
        self._parts = workers
        self._owns_ray = False
        self._pool: Any = None
        self._numbers = count()
        self._answers: dict[int, object] = {}
        entries, further = read_entries(specs), read_entries(gold)
        names = {name for spec in (*entries, *further) for name in secrets_of(spec) if name in os.environ}
        secrets = {name: os.environ[name] for name in names}
        settings = {
            **{"specs": entries, "gold": further, "workers": workers, "timeout_s": timeout_s},
            **{"max_restarts": max_restarts, "columns": list(columns)},
        }

        everyone = processes.gather_objects(os.getpid())

        def start() -> tuple[dict[str, str], str]:
            import ray

            address, environment = cluster_address(), os.environ
            if address is None and environment.get("LOCAL_WORLD_SIZE") != environment.get("WORLD_SIZE"):
                raise ImageRLError(
                    "training processes on several machines need one Ray cluster for their rewards: ray start --head "
                    "on one, ray start --address on the others, and RAY_ADDRESS (docs/scale.md)"
                )
            self._owns_ray = start_ray(workers + 1)
            name = f"rewards-{uuid.uuid4().hex}"
            options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": AT_ONCE}
            self._pool = ray.remote(PoolActor).options(**options).remote(os.getcwd(), secrets)
            return how_to_join(everyone), name

        try:
            way, name = processes.on_main(start)
            if not self._is_main:
                join_ray(**way)
                import ray  # only now: see there

                self._pool = ray.get_actor(name, NAMESPACE)
            self._opened = self._pool.open.remote(settings) if self._is_main else None
        except BaseException:
            self.close()
            raise
        self._processes = processes

    def wait_until_ready(self) -> None:
        """Return when every actor has loaded its rewards. Raises ImageRLError when one cannot. Collective."""
        self._processes.on_main(lambda: self._answer(self._opened))

    def submit(self, request: RewardRequest | StoredRequest, with_gold: bool = False) -> int:
        """Hand whole groups to the pool; returns a ticket for `collect`."""
        refuse_ended_ray()
        ticket = next(self._numbers)
        stored = request if isinstance(request, StoredRequest) else store(request, self._parts)
        self._answers[ticket] = self._pool.score.remote(stored, with_gold)
        return ticket

    def collect(self, ticket: int) -> RewardScores:
        """Wait for the scores of a ticket; each ticket once. Raises ImageRLError when a reward needs mending."""
        scores: RewardScores = self._answer(self._answers.pop(ticket))
        return scores

    def _answer(self, reference: Any) -> Any:
        import ray

        wait_for_ray(reference, math.inf)  # the pool's own patience is at work behind it
        try:
            said = ray.get(reference)
        except ray.exceptions.RayTaskError:
            raise  # a fault of ours, told whole
        except ray.exceptions.RayError as error:
            refuse_ended_ray()
            raise ImageRLError(
                f"the process that hands requests to the reward workers ended ({type(error).__name__}), perhaps for "
                "want of memory; continue with --resume"
            ) from error
        if isinstance(said, str):
            raise ImageRLError(said)
        return said

    def close(self) -> None:
        """Leave the pool; the main process ends it, and Ray if it was started here. May be called twice."""
        import ray

        pool, self._pool = self._pool, None
        if pool is not None and self._is_main and ended_part_of_ray() is None:
            ray.kill(pool)
        if self._owns_ray:
            self._owns_ray = False
            stop_ray()
        elif not self._is_main:
            ray.shutdown()
