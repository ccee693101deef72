"""A curriculum over prompts: those neither solved nor hopeless come more often, by what the run has measured so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch

from imagerl.rl.config.train import CurriculumConfig
from imagerl.rl.data.seeding import GroupedSampler, generator
from imagerl.rl.types import Prompt


def prompt_weights(successes: np.ndarray, samples: np.ndarray, floor: float) -> np.ndarray:
    """Return weights [P] in (0, 1] of prompts by their successes among samples: floor + (1 − floor) · 4 p (1 − p),
    where p = (successes + 1) / (samples + 2) is the success rate under a uniform prior.

    p (1 − p) is the variance of a reward of 0 or 1, to which the gradient of a group is proportional: none where all
    or no samples succeed. A prompt never drawn has p = 1/2."""
    rate = (successes + 1) / (samples + 2)
    return floor + (1 - floor) * 4 * rate * (1 - rate)


class CurriculumSampler(GroupedSampler):
    """The choice of each step's prompts by weight, without replacement: a function of (seed, step) and of what was
    learned before that step. There are no epochs: a prompt may come again in the next step."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        prompts_per_step: int,
        seed: int,
        kind: Callable[[Prompt], Hashable],
        settings: CurriculumConfig,
    ) -> None:
        """Raises ImageRLError as `GroupedSampler`."""
        super().__init__(prompts, prompts_per_step, seed, kind)
        self.settings = settings
        # By `Prompt.index`: successes and samples, those of earlier steps forgotten by and by.
        self._seen: dict[int, tuple[float, float]] = {}

    def step(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 0, which must be the one after those learned from."""
        return self._drawn(step)[: self.prompts_per_step]

    def others(self, step: int) -> list[Prompt]:
        """Return the other prompts of the step's kind, in the order in which they would come next."""
        return self._drawn(step)[self.prompts_per_step :]

    def learn(self, drawn: Sequence[int], values: np.ndarray) -> dict[str, float]:
        """Take note of the values [len(drawn), G] that samples of prompts, by their `index`, were given; NaN is not
        counted. Returns what to log."""
        known = np.isfinite(values)
        successes = ((values >= self.settings.threshold) & known).sum(axis=1)
        for index, won, tried in zip(drawn, successes, known.sum(axis=1), strict=True):
            before = self._seen.get(index, (0.0, 0.0))
            kept = (self.settings.memory * value for value in before)
            self._seen[index] = (next(kept) + float(won), next(kept) + float(tried))
        won, tried = np.array(list(self._seen.values())).T
        return {
            "curriculum/success": float(successes.sum() / max(known.sum(), 1)),
            "curriculum/seen": len(self._seen) / len(self._prompts),
            "curriculum/solved": float((won == tried).mean()),
            "curriculum/hopeless": float((won == 0).mean()),
        }

    def state(self) -> dict[str, list[float]]:
        """Return what was learned, as JSON takes it."""
        return {str(index): list(counts) for index, counts in sorted(self._seen.items())}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from what `state` returned."""
        self._seen = {int(index): (won, tried) for index, (won, tried) in state.items()}

    def _drawn(self, step: int) -> list[Prompt]:
        """Return all prompts of the kind that a step draws, in the order of a weighted draw without replacement: by
        falling u^(1/w), u uniform (Efraimidis and Spirakis 2006)."""
        draws = generator(self._seed, "curriculum", step)
        shares = torch.tensor([float(steps) for steps in self._kind_steps.values()])
        kind = list(self._kind_steps)[int(torch.multinomial(shares, 1, generator=draws))]
        prompts = [p for p, own in zip(self._prompts, self._kinds, strict=True) if own == kind]
        counts = np.array([self._seen.get(prompt.index, (0.0, 0.0)) for prompt in prompts])
        weights = prompt_weights(counts[:, 0], counts[:, 1], self.settings.floor)
        uniforms = 1 - torch.rand(len(prompts), generator=draws, dtype=torch.float64).numpy()  # in (0, 1]
        return [prompts[place] for place in np.argsort(-np.log(uniforms) / weights, kind="stable")]
