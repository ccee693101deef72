"""Ray actors that hold rewards, and the threads in the driver that feed them."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from imagerl.rewards.base import LoadedReward, RewardSpec, load_spec
from imagerl.rewards.boundary.guard import error_line, failed, text_of
from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.workers.scoring import call_reward
from imagerl.rl.engine.actor_thread import ActorLost, ActorThread
from imagerl.rl.engine.cluster import actor_cpus
from imagerl.rl.types import ImageRLError, RewardRequest

NICENESS = 5  # an actor yields to the training process; it catches up while that one waits
START_TIMEOUT_S = 300.0  # loading models; downloads included


@dataclass(frozen=True, slots=True)
class Plan:
    """The rewards that an actor is to hold."""

    specs: Mapping[int, RewardSpec]  # by place in the recipe
    columns: Sequence[str] | None
    patience_s: float
    folder: str  # the driver's; a user's reward may open files relative to it
    # Of the driver's environment, which an actor of a cluster does not inherit.
    secrets: Mapping[str, str] = field(repr=False)


class RewardActor:
    """Runs in a Ray process: holds the loaded rewards and calls one at a time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rewards: dict[int, LoadedReward] = {}
        os.environ.update(plan.secrets)
        os.nice(NICENESS)
        if os.path.isdir(plan.folder):
            os.chdir(plan.folder)

    def load(self, place: int) -> str | None:
        """Load the reward at a place; return None, or what the user has to mend."""
        plan = self._plan
        try:
            self._rewards[place] = LoadedReward(*load_spec(plan.specs[place], plan.patience_s, plan.columns))
        except ImageRLError as error:
            return str(error)
        return None

    def score(self, reward: int, request: RewardRequest) -> Reply | str:
        """Return one reward's reply; a string is what the user has to mend."""
        try:
            return call_reward(self._rewards[reward], request)
        except ImageRLError as error:
            return str(error)


class Call(NamedTuple):
    """One reward on a part of a request."""

    reward: int
    label: str
    request: object  # reference to a RewardRequest in Ray's object store
    size: int


class RewardThread(ActorThread[Call, Reply]):
    """Feeds an actor that holds rewards, whose `labels` are by place. A call that takes too long is not tried again;
    `max_restarts` bounds the actors lost in a row."""

    attempts = 2
    timeout_key = "rewards.timeout_s"

    def __init__(
        self,
        calls: queue.SimpleQueue[tuple[Call, Future[Reply]] | None],
        create: Callable[[], object],
        labels: Mapping[int, str],
        timeout_s: float,
        max_restarts: int,
    ) -> None:
        super().__init__(calls, create, timeout_s)
        self._labels = labels
        self._max_restarts = max_restarts
        self._label = ""  # of the reward that the actor works for
        self._lost: list[tuple[str, ActorLost]] = []  # reward, and why, since the last answer

    def load(self) -> None:
        if len(self._lost) > self._max_restarts:
            labels = " or ".join(repr(label) for label in dict.fromkeys(label for label, _ in self._lost))
            raise ImageRLError(
                f"the process of reward {labels} died or hung {len(self._lost)} times in a row ({self._lost[-1][1]}); "
                "mend the reward (rewards.workers=0 shows it) or raise rewards.max_restarts"
            )
        end = time.monotonic() + START_TIMEOUT_S
        for place, label in self._labels.items():
            try:
                self._asked(label, self.actor.load.remote(place), max(0.0, end - time.monotonic()))
            except ActorLost as lost:
                if lost.hung:
                    raise ImageRLError(
                        f"reward {label!r} was not loaded within {START_TIMEOUT_S:g} s"
                    ) from lost
                raise

    def do(self, work: Call) -> Reply:
        try:
            reply: Reply = self._asked(work.label, self.actor.score.remote(work.reward, work.request))
        except ActorLost as lost:
            if lost.hung:
                return failed(work.size, str(lost))
            raise
        self._lost.clear()
        return reply

    def give_up(self, work: Call, lost: ActorLost) -> Reply:
        return failed(work.size, f"the reward process died {self.attempts} times on this call ({lost})")

    def not_started(self, lost: ActorLost) -> str:
        return (
            f"the process of reward {self._label!r} did not start ({lost}); try rewards.workers=0 to see why"
        )

    def meaning(self, error: Exception) -> Exception:
        import ray

        if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
            told = text_of(error, 5000)[-300:]
            return ImageRLError(f"Ray cannot make the runtime_env of reward {self._label!r}: …{told}")
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return ActorLost("killed for want of memory: use fewer rewards.workers")
        if isinstance(error, ray.exceptions.RayTaskError):  # not users' code, which answers for itself
            return ActorLost(text_of(getattr(error, "cause", error)))
        return super().meaning(error)

    def _asked(self, label: str, reference: Any, timeout_s: float | None = None) -> Any:
        """Ask for a reward, which is to blame where the actor is lost."""
        self._label = label
        try:
            return self.ask(reference, timeout_s)
        except ActorLost as lost:
            self._lost.append((label, lost))
            raise


def refuse_unsendable(label: str, function: object) -> None:
    """Raises ImageRLError for a function given in Python that holds what no other process can have."""
    from ray import cloudpickle

    try:
        cloudpickle.dumps(function)
    except Exception as error:
        raise ImageRLError(
            f"reward {label!r} cannot be sent to a worker ({error_line(error)}); set rewards.workers=0, or let it make "
            "what it holds when it is first called"
        ) from error


def actor_class(gpus: float, environment: Mapping[str, Any] | None) -> Any:
    """Return `RewardActor` for Ray, with GPUs of its own, in a runtime environment of its own or in ours. Raises
    ImageRLError for one that Ray does not accept."""
    import ray
    from ray.runtime_env import RuntimeEnv

    remote = ray.remote(num_cpus=actor_cpus(), num_gpus=gpus, max_restarts=0)(RewardActor)
    if environment is None:
        return remote
    try:
        return remote.options(runtime_env=RuntimeEnv(**environment))
    except Exception as error:
        raise ImageRLError(f"Ray does not accept a reward's runtime_env: {error_line(error)}") from error
