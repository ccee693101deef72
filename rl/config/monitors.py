"""The recipe section of what a run watches itself for. Importable without torch."""

from __future__ import annotations

from pydantic import Field

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.files.bounds import Coefficient, Every


class MonitorsConfig(RecipeModel):
    pictures: bool = Field(
        True, description="log variety within groups and colours of the pictures drawn in training"
    )
    watch: list[str] | None = Field(
        None,
        description="held-out metrics to hold against the total reward, as exact_match; null: the gold metrics",
    )
    level: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="probability that a run whose watched metrics do not fall raises no alarm on them, over all looks",
    )
    max_fall: Coefficient = Field(
        0.02, description="how far a watched metric may fall from its peak while the total reward rises"
    )
    min_diversity: float = Field(
        0.3,
        ge=0,
        le=1,
        description="alarm when variety is less than this part of what it was at first; 0: never",
    )
    max_blank: float = Field(
        0.2,
        ge=0,
        le=1,
        description="alarm when the share of blank pictures has risen by more than this; 1: never",
    )
    window: int = Field(
        5,
        ge=3,
        le=10_000,
        description="evaluations that a correlation is of, and steps averaged for the other alarms",
    )
    patience: Every = Field(
        0, description="end the run after so many evaluations without a higher held-out total; 0: never"
    )
    stop: bool = Field(
        False, description="end the run at the first alarm on a watched metric; peak/ has the best checkpoint"
    )
