"""The schema of a recipe's rewards. Importable without torch, as `rl.config.train` is."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.bounds import Factor, Gpus, Workers
from imagerl.rl.files.environment import HIDDEN


class GateConfig(RecipeModel):
    by: str = Field(
        min_length=1, description="another reward of the list, or one of its parts: ocr/exact_match"
    )
    at_least: Factor | None = Field(None, description="it passes from this value on")
    at_most: Factor | None = Field(None, description="it passes up to this value; give one of the two")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate needs exactly one of at_least and at_most")
        return self


# The fields of a row of an evaluation: a reward of such a name would overwrite one.
EVALUATION_FIELDS = ("index", "sample", "prompt", "total", "reward", "exact_match", "confidence")


# YAML's keys are texts to the recipe reader.
Step = Annotated[int, Field(strict=False, le=10_000_000)]

NO_SOURCE = "(its source could not be found)"
SERVED = r"https?://[\w.\-\[\]:]+(?:/[\w.\-~]+)*/[A-Za-z_]\w*"


class RewardSpec(RecipeModel):
    """One reward. Other keys are its settings, and are checked where its signature is known, in
    `rewards.boundary.targets.check_settings`."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="a reward that ships with imagerl")
    import_path: str | None = Field(None, description="your own: file.py:function or package.module:function")
    url: str | None = Field(
        None, description="a served reward, http://host:port/name (docs/isolated-rewards.md)"
    )
    function: Callable[..., object] | str | None = Field(
        None,
        description="a function given in Python under `name`; written down as its source, which is not run",
    )
    python: str | None = Field(
        None, min_length=1, description="Python interpreter with its own packages that runs import_path"
    )
    runtime_env: dict[str, object] | None = Field(
        None, description="Ray runtime environment of the actor that holds it"
    )
    num_gpus: Gpus = Field(0.0, description="GPUs that each of its actors reserves and alone sees; 0: none")
    weight: Factor | dict[Step, Factor] = Field(
        1.0, description="factor in the total reward; 0: measured only; {step: weight}: linear between steps"
    )
    gate: GateConfig | None = Field(
        None, description="count it only where another reward passes, as 0 elsewhere"
    )
    half: Literal["tokens", "flow", "both"] = Field(
        "both", description="what it teaches, where tokens and decoder train jointly: one half, or both"
    )

    @field_serializer("runtime_env", when_used="json")
    def _without_secrets(self, runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
        """Write only the names of environment variables, anywhere: their values carry keys and tokens."""
        variables = (runtime_env or {}).get("env_vars")
        if runtime_env is None or not variables:
            return runtime_env
        return {**runtime_env, "env_vars": dict.fromkeys(variables, HIDDEN)}

    @field_serializer("function", when_used="json")
    def _source(self, function: Callable[..., object] | str | None) -> str | None:
        return source_of(function) if callable(function) else function

    @property
    def scheduled(self) -> bool:
        return isinstance(self.weight, dict)

    @property
    def teaches(self) -> bool:
        """Tell whether it ever has a weight; else it only measures."""
        return any(self.weight.values()) if isinstance(self.weight, dict) else bool(self.weight)

    @field_validator("weight")
    @classmethod
    def _schedule(cls, weight: float | dict[int, float]) -> float | dict[int, float]:
        if isinstance(weight, dict) and (not weight or min(weight) < 0):
            raise ValueError("a schedule of weights needs steps from 0 on, for example {0: 1.0, 100: 0.2}")
        for factor in weight.values() if isinstance(weight, dict) else [weight]:
            if 0 < abs(factor) < 1e-6:
                raise ValueError(f"a weight of {factor:g} teaches nothing; 0 only measures")
        return weight

    @property
    def label(self) -> str:
        """Return its name in the metrics: the name, or that of the function, or the last part of the address."""
        if self.url is not None:
            return self.url.rpartition("/")[2]
        return self.name or str(self.import_path).rpartition(":")[2]

    @property
    def kwargs(self) -> dict[str, object]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.name, self.import_path, self.url].count(None) != 2:
            raise ValueError("a reward needs exactly one of name, import_path and url")
        if self.function is not None and (self.name is None or self.python or self.runtime_env):
            raise ValueError("a function needs a name, and runs in an environment of ours")
        if self.url is not None and not re.fullmatch(SERVED, self.url):
            raise ValueError(
                "url should look like http://host:port/name, without user, password and query: the token comes from "
                "an environment variable"
            )
        if self.python is not None and self.import_path is None:
            raise ValueError("python needs import_path: only rewards of your own run in another interpreter")
        if self.runtime_env is not None and (self.python is not None or self.url is not None):
            raise ValueError("runtime_env is of the actor; it has no meaning together with python or url")
        if self.import_path is not None and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", self.import_path):
            raise ValueError(f'import_path "{self.import_path}" should look like file.py:function')
        if self.label in EVALUATION_FIELDS:
            raise ValueError(
                f'a reward cannot be called "{self.label}": evaluations have a field of that name; rename the function'
            )
        return self


class RewardsConfig(RecipeModel):
    functions: list[RewardSpec] = Field(
        min_length=1, description="the rewards; their weighted sum is maximised"
    )
    workers: Workers = Field(1, description="Ray actors that score; 0: in this process")
    timeout_s: float = Field(
        60.0, ge=1e-3, le=86_400, description="a scoring call that takes longer has failed"
    )
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="stop when a greater share of samples failed"
    )
    max_restarts: int = Field(3, ge=0, le=1000, description="times that a dead or hanging actor is replaced")

    @field_validator("functions")
    @classmethod
    def _labels(cls, functions: list[RewardSpec]) -> list[RewardSpec]:
        labels = [spec.label for spec in functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f'two rewards are called "{label}"; metrics could not tell them apart')
        if not any(spec.teaches for spec in functions):
            raise ValueError("the weights are all 0: there is nothing to learn from")
        for spec in functions:
            by = spec.gate.by.partition("/")[0] if spec.gate else None
            if spec.gate and (by not in labels or by == spec.label):
                others = ", ".join(label for label in labels if label != spec.label) or "none"
                raise ValueError(
                    f'the gate of "{spec.label}" asks for "{spec.gate.by}", which is no other reward; '
                    f"there is: {others}"
                )
        return functions

    def labels_of(self, half: str) -> list[str]:
        """Return the labels of the rewards that teach a half of the generator."""
        return [spec.label for spec in self.functions if spec.half in (half, "both")]

    def require_halves(self, joint: bool) -> None:
        """Raise ValueError where a reward is for a half that does not train apart, or a half has no reward."""
        apart = [spec for spec in self.functions if spec.half != "both"]
        if apart and not joint:
            raise ValueError(
                f'the half of reward "{apart[0].label}" is {apart[0].half}, which has no meaning where one half '
                "trains; remove it, or train both: algorithm.flow.joint: true"
            )
        for half in ("tokens", "flow"):
            if not any(spec.teaches and spec.half in (half, "both") for spec in self.functions):
                raise ValueError(
                    f"no reward with a weight teaches the {half}; give one half: {half} or half: both"
                )


def source_of(function: Callable[..., object]) -> str:
    """Return the text that defines a function, or the class of an object. What it closes over is not in it."""
    named = inspect.isroutine(function) or inspect.isclass(function)
    try:
        return textwrap.dedent(inspect.getsource(function if named else type(function)))
    except (OSError, TypeError):
        return NO_SOURCE


def refuse_hidden(rewards: Sequence[RewardSpec]) -> None:
    """Raise ImageRLError for a recipe that a run has written, without the secrets that it was given."""
    for spec in rewards:
        variables = (spec.runtime_env or {}).get("env_vars")
        for name, value in variables.items() if isinstance(variables, dict) else ():
            if value == HIDDEN:
                raise ImageRLError(
                    f'the recipe lacks the value of env_vars.{name} of reward "{spec.label}", which no run writes '
                    "down; give it again"
                )


def without_addresses(value: Any) -> Any:
    """Drop the hosts of served rewards from a recipe's values: rewards are the same wherever they are served."""
    if isinstance(value, dict):
        return {
            key: entry.rpartition("/")[2]
            if key == "url" and isinstance(entry, str)
            else without_addresses(entry)
            for key, entry in value.items()
        }
    return [without_addresses(entry) for entry in value] if isinstance(value, list) else value
