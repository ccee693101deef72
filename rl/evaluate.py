"""Held-out evaluation: one sample of each prompt with fixed random numbers, scored and summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from rl.errors import ImageRLError
from rl.rollout import reward_request
from rl.stats import Interval, summarise
from rl.types import Prompt, RewardScorer, RolloutGroup


@dataclass(slots=True)
class Evaluation:
    """Results of one suite. `per_prompt` rows hold `index`, `prompt` and every metric; NaN where a sample
    could not be scored."""

    suite: str
    metrics: dict[str, Interval]
    per_prompt: list[dict[str, Any]]
    images: np.ndarray  # [N, H, W, 3] uint8, in the order of `per_prompt`
    totals: list[float] = field(
        default_factory=list
    )  # of each row, the trained rewards' weighted sum; NaN: none

    def flat(self) -> dict[str, float]:
        """For metrics.jsonl: `eval/<suite>/<metric>`."""
        return {f"eval/{self.suite}/{name}": interval.mean for name, interval in self.metrics.items()}

    def to_dict(self, **facts: Any) -> dict[str, Any]:
        """The JSON document of an evaluation; see docs/run-folder.md."""
        intervals = {
            name: {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
            for name, value in self.metrics.items()
        }
        return {
            "suite": self.suite,
            **facts,
            "n": len(self.per_prompt),
            "metrics": intervals,
            "per_prompt": self.per_prompt,
        }


class Source(Protocol):
    """Where pictures come from: a `RolloutEngine`, or `GroundTruth`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]: ...


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Perfect pictures instead of a model's: evaluated, they give the ceiling of every metric."""

    draw: Callable[[Prompt], Image.Image]

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        nothing = torch.zeros(group_size, 0)
        for prompt in prompts:
            images = np.stack([np.asarray(self.draw(prompt))] * group_size)
            yield [RolloutGroup(prompt, nothing.long(), nothing, nothing.bool(), images)]


def evaluate(
    suite: str, prompts: Sequence[Prompt], rollout: Source, scorer: RewardScorer, batch_size: int
) -> Evaluation:
    """Draw one picture of each prompt and score it.

    Random numbers depend on the rollout's seed and the prompt alone, so that two policies are compared on the
    same draws. A metric named `<suite>` is reported as `reward`, its parts `<suite>/<part>` as `<part>`, those of
    other rewards under their own names. Raises ImageRLError for a reward whose name is that of another field."""
    images, rows, tickets, totals = [], [], [], []
    for groups in rollout.generate(prompts, 1, f"eval {suite}", batch_size, batch_size):
        request = reward_request(groups)
        tickets.append((groups, scorer.submit(request, with_gold=True)))
        images.append(request.images)
    for groups, ticket in tickets:
        scores = scorer.collect(ticket)
        names = _metric_names(scores.components, suite)
        totals += scores.totals.tolist()
        for row, group in enumerate(groups):
            values = {names[component]: float(v[row]) for component, v in scores.components.items()}
            rows.append({"index": group.prompt.index, "prompt": group.prompt.text, **values})
    return Evaluation(suite, summarise(rows), rows, np.concatenate(images), totals)


def _metric_names(components: Iterable[str], suite: str) -> dict[str, str]:
    """What each component is called in a row, no two alike."""
    names: dict[str, str] = {}
    for component in components:
        name = "reward" if component == suite else component.removeprefix(f"{suite}/")
        if name in ("index", "prompt") or name in names.values():
            raise ImageRLError(
                f"reward {component!r}: an evaluation of {suite!r} has another field {name!r}; rename the reward"
            )
        names[component] = name
    return names
