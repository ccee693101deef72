"""The published objective of supervised fine-tuning (arXiv 2510.15857): cross-entropy on the image tokens plus the
flow-matching loss, the gradient of both into the language model.

The decoder is trained on the hidden states that inference will give it: those of `<S0>` and of every token. The
public trainer selects others, about three positions later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imagerl.models.base import SupervisedScores
from imagerl.models.common.supervised import noise_levels, token_nll
from imagerl.rl.types import Prompt, Rows

if TYPE_CHECKING:
    from imagerl.models.blip3o_next.policy import ImagePolicy


def prompt_targets(prompt_ids: Tensor, prompt_mask: Tensor, image_columns: slice) -> tuple[Tensor, Tensor]:
    """Return what positions 0..L−2 of a prompt should predict, and which count: [B, L − 1] ids and bools. Padding does
    not count, nor do image tokens: in a prompt they are those of a reference picture, given and not drawn."""
    following = prompt_ids[:, 1:]
    given = (following >= image_columns.start) & (following < image_columns.stop)
    return following, prompt_mask[:, :-1].bool() & ~given


class SupervisedModule(nn.Module):
    """Every trainable part, in one module for the engine: language model, connector, flow transformer. The autoencoder
    stays outside."""

    def __init__(self, policy: ImagePolicy, on_prompt: bool, with_flow: bool) -> None:
        super().__init__()
        self.ar = policy.trainable
        parts = {name: part for name, part in policy.decoder.named_children() if name != "vae"}
        self.decoder = nn.ModuleDict(parts)
        self.on_prompt = on_prompt
        self.with_flow = with_flow
        self._flow = (policy.decoder,)  # in a tuple: its parts are registered above

    def forward(self, prompts: Rows, targets: Rows, draws: Rows) -> SupervisedScores:
        ar, tokens = self.ar, targets["tokens"]
        prompt_ids, prompt_mask = prompts["ids"], prompts["mask"]
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
            decoder, reference = self._flow[0], prompts.get("reference")
            sigma = noise_levels(draws["uniform"], float(decoder.scheduler_config.get("shift", 1.0)))
            # The gradient goes on into the language model through `hidden`: the published objective trains both by it.
            residual = decoder.flow_residual(
                hidden, targets["latents"], sigma, draws["noise"], draws["drop"], reference
            )
            flow = residual.square().flatten(1).mean(1)
            if reference is None:
                flow = flow + self._idle()
        return SupervisedScores(image, prompt, flow)

    def _idle(self) -> Tensor | float:
        """Return 0 by way of parameters that only edits use: processes that exchange gradients wait for all of them."""
        idle = [
            parameter.sum()
            for name, parameter in self.decoder.named_parameters()
            if name.startswith("reference_connector.") and parameter.requires_grad
        ]
        return 0.0 * torch.stack(idle).sum() if idle else 0.0


class Lessons:
    """Implements `models.base.Lessons`."""

    parts: Mapping[str, Sequence[str]] = {
        "ar": ("full", "lora"),
        "connector": ("full",),
        "decoder": ("full", "caption"),
    }
    predicts_prompts = True

    def __init__(self, policy: ImagePolicy, on_prompt: bool, with_flow: bool) -> None:
        policy.require_tokenizer().float()  # bfloat16 does not tell neighbouring codes apart
        self.policy = policy
        self.trainable = SupervisedModule(policy, on_prompt, with_flow)

    @staticmethod
    def part_of(name: str) -> str:
        if name.startswith("ar."):
            return "ar"
        if ".unused_" in name:
            return ""
        if not name.startswith("decoder.sana."):
            return "connector"
        return "decoder.caption" if "caption_" in name else "decoder"

    def targets(self, prompts: Sequence[Prompt], pictures: Tensor) -> Rows:
        with torch.autocast(pictures.device.type, enabled=False):
            tokens = self.policy.tokens_of(pictures)
        return {"tokens": tokens, "latents": self.policy.decoder.encode(pictures).float()}

    def counted(self, prompts: Rows, tokens: Tensor) -> Tensor:
        image = torch.full((len(tokens),), tokens.shape[1] + 1, device=tokens.device)  # and the end
        prompt = torch.zeros_like(image)
        if self.trainable.on_prompt:
            columns = self.policy.vocabulary.columns
            prompt = prompt_targets(prompts["ids"], prompts["mask"], columns)[1].sum(1)
        return torch.stack([image, prompt], 1)
