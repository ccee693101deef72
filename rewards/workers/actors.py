"""Ray actors that hold rewards, and the threads in the driver that feed them.

Each actor has one thread in the driver that hands it one call at a time. Thus a call's time-out starts when
the call does, a free actor takes the next call, and a dead or hanging actor holds up nobody but itself."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from imagerl.rewards.base import LoadedReward, RewardSpec, load_spec
from imagerl.rewards.boundary.guard import error_line, failed, text_of
from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.workers.scoring import call_reward
from imagerl.rl.engine.cluster import actor_cpus, ended_part_of_ray, refuse_ended_ray
from imagerl.rl.types import ImageRLError, RewardRequest

NICENESS = 5  # an actor yields to the training process; it catches up while that one waits
ATTEMPTS = 2  # of one call, when the actor dies under it
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


@dataclass(slots=True)
class Call:
    """One reward on a part of a request."""

    reward: int
    label: str
    request: Any  # reference to a RewardRequest in Ray's object store
    size: int
    answer: Future[Reply]


class _Died(Exception):
    """Ray lost the process of the rewards, by whatever of its errors, under work for the reward `label`."""

    def __init__(self, label: str, why: str) -> None:
        super().__init__(why)
        self.label = label


class Worker(threading.Thread):
    """Owns one actor: starts it, feeds it from the shared queue, replaces it when it dies or hangs.

    `labels` are those of the rewards that the actor holds, by place."""

    def __init__(
        self,
        calls: queue.SimpleQueue[Call | None],
        create: Any,
        labels: Mapping[int, str],
        timeout_s: float,
        max_restarts: int,
    ) -> None:
        super().__init__(daemon=True, name="reward-worker")
        self.ready: Future[None] = Future()
        self._calls = calls
        self._create = create
        self._labels = labels
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        self._lost: list[str] = []  # rewards under which an actor died or hung, since the last answer
        self._actor: Any = None
        self._closing = False

    def run(self) -> None:
        try:
            self._start_actor()
            self.ready.set_result(None)
        except _Died as death:
            self.ready.set_exception(
                ImageRLError(
                    f"the process of reward {death.label!r} did not start ({death}); try rewards.workers=0 to see why"
                )
            )
        except Exception as error:
            self.ready.set_exception(error)
        while (call := self._calls.get()) is not None:
            try:
                call.answer.set_result(self._answer(call))
            except Exception as error:
                call.answer.set_exception(error)

    def stop(self) -> None:
        """End the actor, also under a call, and one of the threads that share the queue, at its next call."""
        self._closing = True
        self._calls.put(None)
        self._kill_actor()

    def _start_actor(self) -> None:
        """Start an actor and have it load its rewards. Raises _Died, and ImageRLError for what must be mended."""
        import ray

        end = time.monotonic() + START_TIMEOUT_S
        for place, label in self._labels.items():
            with self._watched(label):
                if self._actor is None:
                    self._actor = self._create()
                try:
                    problem = ray.get(self._actor.load.remote(place), timeout=max(0, end - time.monotonic()))
                except ray.exceptions.GetTimeoutError:
                    problem = f"reward {label!r} was not loaded within {START_TIMEOUT_S:g} s"
            if problem is not None:
                self._kill_actor()
                raise ImageRLError(problem)

    def _kill_actor(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized() and ended_part_of_ray() is None:
            ray.kill(actor)

    @contextmanager
    def _watched(self, label: str) -> Iterator[None]:
        """Watch the actor's work for a reward. Every way in which Ray can lose it ends the actor and is _Died; what
        ends the run at once is an ImageRLError. A time-out passes through."""
        import ray

        refuse_ended_ray()
        try:
            yield
        except ray.exceptions.GetTimeoutError:
            raise
        except ray.exceptions.RuntimeEnvSetupError as error:
            self._kill_actor()
            raise ImageRLError(
                f"Ray cannot make the runtime_env of reward {label!r}: …{text_of(error, 5000)[-300:]}"
            ) from error
        except ray.exceptions.RayError as error:
            self._kill_actor()
            refuse_ended_ray()
            raise _Died(label, _why(error)) from error

    def _answer(self, call: Call) -> Reply:
        import ray

        death = None
        for _ in range(ATTEMPTS):
            try:
                if self._actor is None:
                    self._restart(death)
                with self._watched(call.label):
                    values = ray.get(
                        self._actor.score.remote(call.reward, call.request), timeout=self._timeout_s
                    )
            except ray.exceptions.GetTimeoutError:
                self._kill_actor()
                self._lost.append(call.label)
                return failed(call.size, f"no answer within {self._timeout_s:g} s (rewards.timeout_s)")
            except _Died as error:
                death = error
                self._lost.append(death.label)
                continue
            self._lost.clear()
            if isinstance(values, str):
                raise ImageRLError(values)
            return values
        return failed(call.size, f"the reward process died {ATTEMPTS} times on this call ({death})")

    def _restart(self, death: _Died | None) -> None:
        if self._closing:
            raise RuntimeError("the reward workers are closed")
        if len(self._lost) > self._max_restarts:
            labels = " or ".join(repr(label) for label in dict.fromkeys(self._lost))
            why = f" ({death})" if death else ""
            raise ImageRLError(
                f"the process of reward {labels} died or hung {len(self._lost)} times in a row{why}; "
                "mend the reward (rewards.workers=0 shows it) or raise rewards.max_restarts"
            )
        self._start_actor()


def _why(error: Exception) -> str:
    """Quote Ray's reason for a lost call, without its paragraphs."""
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "killed for want of memory: use fewer rewards.workers"
    if isinstance(error, ray.exceptions.RayTaskError):  # not users' code, which answers for itself
        return text_of(getattr(error, "cause", error))
    return type(error).__name__


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
