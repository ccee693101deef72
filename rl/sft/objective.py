"""The published objective of supervised fine-tuning (arXiv 2510.15857): cross-entropy on the image tokens plus the
flow-matching loss, the gradient of both into the language model.

The decoder is trained on the hidden states that inference will give it: those of `<S0>` and of every token. The
public trainer selects others, about three positions later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.data.seeding import derive_seed

MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once: 128 MiB, whatever the vocabulary


class SFTScores(NamedTuple):
    """Losses of B samples, each [B] float32: sums of −log p over tokens, and the mean squared flow residual."""

    image_nll: Tensor  # over the T image tokens and the closing `<im_end>`
    prompt_nll: Tensor  # over the prompt's own tokens; 0 when it is not trained on
    flow: Tensor


@dataclass(slots=True)
class SFTBatch:
    """The inputs of the losses of B samples."""

    prompt_ids: Tensor  # [B, L] left-padded, ending in <im_start><S0>
    prompt_mask: Tensor  # [B, L] bool
    tokens: Tensor  # [B, T] 0-based image tokens
    latents: Tensor  # [B, C, h, w] float32
    sigma: Tensor  # [B]
    noise: Tensor  # [B, C, h, w]
    drop: Tensor  # [B] bool: the condition is the unconditional one
    reference: Tensor | None = (
        None  # [B, C, h, w] latents that an edit starts from; its tokens are in the prompt
    )

    def inputs(self) -> tuple[Tensor | None, ...]:
        return (
            self.prompt_ids,
            self.prompt_mask,
            self.tokens,
            self.latents,
            self.sigma,
            self.noise,
            self.drop,
            self.reference,
        )


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return −log p of ids `targets` [N] after hidden states [N, D] under the whole vocabulary of `head` [V, D], in
    float32. Memory is one chunk of logits; chunks are recomputed in the backward pass."""

    def chunk(rows: Tensor, ids: Tensor) -> Tensor:
        # float32: a log-softmax over some 200,000 columns loses small differences in bfloat16.
        return F.cross_entropy(F.linear(rows, head).float(), ids, reduction="none")

    size = max(1, MAX_LOGITS_PER_CHUNK // head.shape[0])
    parts = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(parts) == 1:
        return chunk(*parts[0])
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def prompt_targets(prompt_ids: Tensor, prompt_mask: Tensor, image_columns: slice) -> tuple[Tensor, Tensor]:
    """Return what positions 0..L−2 of a prompt should predict, and which count: [B, L − 1] ids and bools. Padding does
    not count, nor do image tokens: in a prompt they are those of a reference picture, given and not drawn."""
    following = prompt_ids[:, 1:]
    given = (following >= image_columns.start) & (following < image_columns.stop)
    return following, prompt_mask[:, :-1].bool() & ~given


def noise_levels(uniform: Tensor, shift: float) -> Tensor:
    """Turn uniform numbers in [0, 1) into σ, shifted as the scheduler's own schedule is (arXiv 2403.03206, eq. 23)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


class SFTModule(nn.Module):
    """Every trainable part, in one module for the engine: language model, connector, flow transformer. The autoencoder
    stays outside."""

    def __init__(self, policy: Any, on_prompt: bool, with_flow: bool) -> None:
        super().__init__()
        self.ar: Any = policy.trainable
        parts = {name: part for name, part in policy.decoder.named_children() if name != "vae"}
        self.decoder = nn.ModuleDict(parts)
        self.on_prompt = on_prompt
        self.with_flow = with_flow
        self._flow = (policy.decoder,)  # in a tuple: its parts are registered above

    def choose(self, recipe: SFTRecipe) -> None:
        """Give gradients to what the recipe trains, and to nothing else."""
        trained = recipe.train
        self.ar.merge_adapter()  # that the start came with
        self.requires_grad_(False)
        if trained.ar == "lora":
            lora = trained.lora
            torch.manual_seed(derive_seed(recipe.run.seed, "lora"))  # adapters begin at random
            self.ar.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
        for name, parameter in self.named_parameters():
            how = "frozen" if ".unused_" in name else getattr(trained, part_of(name))
            if how == "full" or (how == "caption" and "caption_" in name):
                parameter.requires_grad_(True)
        if trained.gradient_checkpointing:
            self.ar.lm.activation_checkpointing_enable({"use_reentrant": False})
            self._flow[0].sana.enable_gradient_checkpointing()

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        tokens: Tensor,
        latents: Tensor,
        sigma: Tensor,
        noise: Tensor,
        drop: Tensor,
        reference: Tensor | None = None,
    ) -> SFTScores:
        ar = self.ar
        # Without a graph where nothing here learns: the activations are most of the memory.
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in ar.parameters())
        with torch.set_grad_enabled(learns):
            states = ar.sequence_states(prompt_ids, prompt_mask, tokens)
            # From <S0>, which predicts the first token, to the last one, which predicts the end: what decoders see.
            hidden = states[:, prompt_ids.shape[1] - 1 :]
            head = ar.lm.lm_head.weight
            end = torch.full_like(tokens[:, :1], ar.vocabulary.image_end_tag_id)
            ids = torch.cat([tokens + ar.vocabulary.image_start_token_id, end], dim=1)
            image = token_nll(hidden.flatten(0, 1), head, ids.flatten()).view_as(ids).sum(1)
            prompt = torch.zeros_like(image)
            if self.on_prompt:
                following, counted = prompt_targets(prompt_ids, prompt_mask, ar.vocabulary.columns)
                before = states[:, : prompt_ids.shape[1] - 1]
                # Only counted positions meet the vocabulary: their logits would be most of the memory.
                nll = token_nll(before[counted], head, following[counted])
                prompt = nll.new_zeros(counted.shape).masked_scatter(counted, nll).sum(1)
        flow = torch.zeros_like(image)
        if self.with_flow:
            # The gradient goes on into the language model through `hidden`: the published objective trains both by it.
            residual = self._flow[0].flow_residual(hidden, latents, sigma, noise, drop, reference)
            flow = residual.square().flatten(1).mean(1)
            if reference is None:
                flow = flow + self._idle()
        return SFTScores(image, prompt, flow)

    def _idle(self) -> Tensor | float:
        """Return 0 by way of parameters that only edits use: processes that exchange gradients wait for all of them."""
        idle = [
            parameter.sum()
            for name, parameter in self.decoder.named_parameters()
            if name.startswith("reference_connector.") and parameter.requires_grad
        ]
        return 0.0 * torch.stack(idle).sum() if idle else 0.0


def sft_module(policy: Any, recipe: SFTRecipe) -> SFTModule:
    """Return the module that the engine prepares, whose parameter names are those of checkpoints."""
    module = SFTModule(policy, recipe.objective.on_prompt, recipe.objective.flow_weight > 0)
    module.choose(recipe)
    return module


def part_of(name: str) -> str:
    """Tell which of ar, connector and decoder a parameter of `SFTModule` belongs to."""
    if name.startswith("ar."):
        return "ar"
    return "decoder" if name.startswith("decoder.sana.") else "connector"
