"""Budgets of pictures or minutes, for runs that these and not a number of steps end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imagerl.rl.config.train import Recipe


@dataclass(slots=True)
class Budget:
    """Pictures drawn for training, or minutes of it; evaluations, grids, checkpoints and the start are free."""

    images: int | None = None
    minutes: float | None = None
    step_images: int = 0  # of a step without resampling
    steps: int = 0  # made so far
    drawn: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Budget:
        rollout = recipe.rollout
        per_step = rollout.prompts_per_step * rollout.group_size * rollout.decodes
        return cls(recipe.run.images, recipe.run.minutes, per_step)

    @property
    def share(self) -> float | None:
        """Return the part that is spent, at most 1, which schedules follow; None where steps decide."""
        if self.images is not None:
            return min(1.0, self.drawn / self.images)
        if self.minutes is not None:
            return min(1.0, self.seconds / (60 * self.minutes))
        return None

    @property
    def spent(self) -> bool:
        """Tell whether no room is left: for the pictures of another step, or for half the time of one."""
        if self.images is not None:
            return self.drawn + self.step_images > self.images
        if self.minutes is not None:
            return self.seconds + self.seconds / max(1, self.steps) / 2 > 60 * self.minutes
        return False

    def spend(self, metrics: Mapping[str, float]) -> None:
        """Count a step by its metrics."""
        self.steps += 1
        self.drawn += metrics.get("rollout/images", 0.0)
        self.seconds += metrics.get("time/step_s", 0.0)

    def expected_steps(self) -> int | None:
        """Estimate the steps of the whole run from those so far; None where nothing tells."""
        share = self.share
        return max(self.steps, round(self.steps / share)) if share else None

    def state(self) -> dict[str, float]:
        return {"steps": self.steps, "drawn": self.drawn, "seconds": self.seconds}

    def restore(self, state: Mapping[str, float]) -> None:
        self.steps = int(state.get("steps", 0))
        self.drawn, self.seconds = (float(state.get(key, 0.0)) for key in ("drawn", "seconds"))
