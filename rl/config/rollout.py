"""The `rollout` section of a training recipe. Importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.files.bounds import Count, FlowSteps, Gpus, Guidance, Positive, Workers

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe


class RolloutConfig(RecipeModel):
    prompts_per_step: Count = Field(16, description="prompts drawn each step")
    group_size: int = Field(
        16, ge=2, le=2**16, description="samples of each prompt; advantages compare within them"
    )
    temperature: float = Field(
        1.0, ge=1e-3, le=100, description="of sampling, and of the scored distribution alike"
    )
    top_k: int | None = Field(None, description="must stay null: log-probs are of the whole distribution")
    top_p: float | None = Field(None, description="must stay null: log-probs are of the whole distribution")
    guidance: Guidance = Field(
        2.0, description="classifier-free guidance of the decoder; 1: none, the default for nft and awm"
    )
    flow_steps: FlowSteps = Field(30, description="denoising steps of the decoder")
    token_guidance: Guidance = Field(
        1.0,
        description="classifier-free guidance on the logits of tokens, for families that have it; 1: none",
    )
    thought_tokens: int = Field(
        0,
        ge=0,
        le=1 << 14,
        description="longest text that the model writes before its image tokens, trained with them; 0: none",
    )
    shared_noise: bool = Field(False, description="one decoder noise a group: rewards differ by tokens only")
    decodes: FlowSteps = Field(
        1,
        description="pictures drawn of each token sequence, whose rewards are averaged for the tokens",
    )
    sample_chunk: Count | None = Field(
        None, description="prompts whose tokens are sampled together; null: all of a step"
    )
    decode_chunk: Count | None = Field(
        None, description="prompts drawn, then handed to the rewards, at a time; null: as sampled"
    )
    max_logprob_diff: Positive | None = Field(
        None,
        description="stop when sampler and trainer differ more on a log-prob; null: 0.01, bf16 1",
    )
    workers: Workers = Field(
        0, description="Ray actors that draw, each with the whole model; 0: this process"
    )
    num_gpus: Gpus | None = Field(
        None, description="GPUs that each of those reserves; null: 1 where training takes GPUs"
    )
    max_staleness: Literal[0, 1] = Field(
        0, description="updates that the weights which draw may lack; 1: the next step is drawn meanwhile"
    )

    @field_validator("top_k", "top_p")
    @classmethod
    def _whole_distribution(cls, value: float | None) -> None:
        if value is not None:
            raise ValueError("top_k and top_p must be null in training: samples would come from a truncated "
                             "distribution but be scored by the whole one")  # fmt: skip

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where samples of older weights would train as if they were of the present ones."""
        if not self.max_staleness:
            return
        data, algorithm = recipe.data, recipe.algorithm
        for impossible, remedy in (
            (self.workers == 0, "draws beside the update: set rollout.workers to 1 or more"),
            (
                algorithm.importance_cap is None,
                "needs truncated importance weights: set algorithm.importance_cap, for example 2",
            ),
            (algorithm.flow, "has no importance weights of denoising steps: remove algorithm.flow"),
            (algorithm.kl_in == "reward", "weighs the KL as a loss term only: set algorithm.kl_in: loss"),
            (data.curriculum, "draws before the last step's successes are known: remove data.curriculum"),
            (algorithm.max_resamples, "cannot replace silent groups: set algorithm.max_resamples: 0"),
        ):
            if impossible:
                raise ValueError(f"rollout.max_staleness: 1 {remedy}; or set it to 0")
