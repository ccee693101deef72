"""Random choices as pure functions of what they are for, so that any of them can be made again alone."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache

import torch

from imagerl.rl.types import ImageRLError, Prompt


def derive_seed(*key: int | str) -> int:
    """Derive a 63-bit seed from a key such as (run seed, "tokens", step, prompt, sample). Different keys give
    independent streams; the same key gives the same stream on every machine and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator for `key`. Always on the CPU, so that draws do not depend on the accelerator."""
    return torch.Generator().manual_seed(derive_seed(*key))


class GroupedSampler:
    """The choice of each step's prompts: a pure function of (seed, step), so a resumed run needs no replay.

    Every epoch is a fresh permutation of the prompts, cut into whole steps of one kind: where models draw pictures of
    several sizes, those of a step have the same. What does not fill a step is left out of that epoch, so that no prompt
    appears twice in an epoch, nor in a step.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        prompts_per_step: int,
        seed: int,
        kind: Callable[[Prompt], Hashable] = lambda prompt: None,
    ) -> None:
        """Raises ImageRLError when a kind has fewer prompts than a step needs."""
        self._prompts = tuple(prompts)
        self._kinds = [kind(prompt) for prompt in self._prompts]
        counts = Counter(self._kinds)
        for which, count in counts.items() or {None: 0}.items():
            if count < prompts_per_step:
                raise ImageRLError(
                    f"rollout.prompts_per_step is {prompts_per_step} but data.train has only {count} prompts"
                    f"{f' of {which}' if len(counts) > 1 else ''}; lower it or add prompts"
                )
        self.prompts_per_step = prompts_per_step
        self._kind_steps = {which: count // prompts_per_step for which, count in counts.items()}
        self.steps_per_epoch = sum(self._kind_steps.values())
        self._seed = seed
        self._order = lru_cache(maxsize=1)(self._steps)

    def step(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return [self._prompts[i] for i in self._order(epoch)[place]]

    def others(self, step: int) -> list[Prompt]:
        """Return all prompts of the step's kind but its own, in an order drawn for that step: these may replace some of
        them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        own = self._order(epoch)[place]
        kind, chosen = self._kinds[own[0]], set(own)
        rest = [p for i, p in enumerate(self._prompts) if i not in chosen and self._kinds[i] == kind]
        random.Random(derive_seed(self._seed, "resample", step)).shuffle(rest)
        return rest

    def _steps(self, epoch: int) -> list[list[int]]:
        """Return the places of the prompts of each step of an epoch."""
        order = list(range(len(self._prompts)))
        random.Random(derive_seed(self._seed, "prompt order", epoch)).shuffle(order)
        alike: dict[Hashable, list[int]] = {}
        for place in order:
            alike.setdefault(self._kinds[place], []).append(place)
        size = self.prompts_per_step
        steps = [
            same[first : first + size]
            for same in alike.values()
            for first in range(0, len(same) - size + 1, size)
        ]
        if len(alike) > 1:
            random.Random(derive_seed(self._seed, "step order", epoch)).shuffle(steps)
        return steps
