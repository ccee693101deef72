"""Settings in model folders, read strictly: what is not listed is refused, not handed on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from imagerl.rl.types import SamplingParams

Dropout = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SamplingSettings(Settings):
    """How a model draws where a user says nothing else."""

    guidance: float = Field(ge=0, le=1000)
    flow_steps: int = Field(ge=1, le=1000)
    temperature: float = Field(1.0, gt=0, le=1000)
    token_guidance: float = Field(1.0, ge=0, le=1000)
    thought_tokens: int = Field(0, ge=0, le=1 << 16)

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


def stored_sampling(sampling: SamplingParams) -> dict[str, float]:
    """Return what `SamplingSettings` reads."""
    stored: dict[str, float] = {
        "guidance": sampling.guidance,
        "flow_steps": sampling.flow_steps,
        "temperature": sampling.temperature,
    }
    if sampling.token_guidance != 1:
        stored["token_guidance"] = sampling.token_guidance
    if sampling.thought_tokens:
        stored["thought_tokens"] = sampling.thought_tokens
    return stored
