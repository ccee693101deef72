"""Before anything is drawn: the sampling of evaluations, and settings that a model cannot draw by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from imagerl.models.base import PromptReader
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.engine import training_sampling
from imagerl.rl.types import Prompt, SamplingParams

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe


def evaluation_sampling(recipe: Recipe) -> SamplingParams:
    """Return the sampling that a recipe is judged by: as in training where `eval` does not say otherwise, one picture
    of each token sequence. A decoder that trains at a guidance of its own is judged at that one."""
    training, settings, flow = training_sampling(recipe), recipe.eval, recipe.algorithm.flow
    wanted = (settings.guidance, flow.guidance if flow else None, training.guidance)
    return replace(
        training,
        guidance=next(value for value in wanted if value is not None),
        flow_steps=settings.flow_steps or training.flow_steps,
        decodes=1,
    )


def refuse_impossible(
    reader: PromptReader,
    prompts: Iterable[Prompt],
    sampling: SamplingParams,
    flow: bool = False,
    regions: bool = False,
) -> None:
    """Raise ImageRLError for settings that a model cannot draw by; with `flow` its denoising steps are to train, with
    `regions` its tokens must lie on a grid."""
    if regions and any(reader.canvas(prompt).grid is None for prompt in prompts):
        raise ImageRLError(
            "algorithm.region_credit needs tokens that lie on one grid over the picture, and this model's do not; set "
            "it to 0"
        )
    if sampling.token_guidance != 1 and not reader.token_guided:
        raise ImageRLError(
            f"token_guidance is {sampling.token_guidance:g}, but this model writes its tokens without guidance; set it "
            "to 1"
        )
    if sampling.thought_tokens:
        room = reader.thought_room - reader.longest([*prompts])
        if sampling.thought_tokens > room:
            fits = (
                f"has room for {max(room, 0)}" if reader.thought_room else "writes no text before a picture"
            )
            raise ImageRLError(
                f"thought_tokens is {sampling.thought_tokens}, but this model {fits}; set it to {max(room, 0)}"
                f"{' or less' if room > 0 else ''}"
            )
    if all(reader.canvas(prompt).noise is not None for prompt in prompts):
        return
    for wanted, what in (
        (flow, "algorithm.flow trains denoising steps"),
        (sampling.shared_noise, "shared_noise shares decoder noise"),
        (sampling.decodes > 1, "decodes draws several pictures of the same tokens"),
    ):
        if wanted:
            raise ImageRLError(
                f"{what}, but this model's decoder has no noise: the same tokens always give the same picture; "
                "remove the setting"
            )
