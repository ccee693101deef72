"""The decoder's own stage: flow matching on hidden states that are computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tiny.config import DecoderStage
from tools.tiny.samples import edits, pictures, samples
from tools.tiny.stages import LogFn, fit


@dataclass(frozen=True, slots=True)
class KeptStates:
    """The decoder's training data, of N pictures."""

    hidden: Tensor  # [N, T + 1, D]
    latents: Tensor  # [N, C, h, w] of the picture to draw
    tokens: Tensor  # [N, T] of the picture to draw
    reference: Tensor | None = None  # [N, C, h, w] of the picture that an edit starts from


def join(parts: list[KeptStates]) -> KeptStates:
    references = [part.reference for part in parts if part.reference is not None]
    return KeptStates(
        hidden=torch.cat([part.hidden for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        reference=torch.cat(references) if references else None,
    )


@torch.no_grad()
def kept_states(policy: Any, stage: DecoderStage) -> KeptStates:
    """Compute states of the stage's pictures, drawn from captions."""
    parts = []
    for start in range(0, stage.pictures, 64):
        batch = samples(stage.pictures_seed, "cache", start, 64, stage)
        wanted = pictures(batch).to(policy.device)
        tokens = policy.image_tokenizer.encode(wanted)
        prompts = policy.encode_prompts([scene.caption for scene in batch])
        hidden = policy.trainable.hidden_states(*prompts, tokens)
        if stage.fade:
            wanted = wanted[:, :, :1, :1].lerp(wanted, 1 - stage.fade)  # letters keep off the corner
        parts.append(KeptStates(hidden, policy.decoder.encode(wanted), tokens))
    return join(parts)


@torch.no_grad()
def kept_edits(policy: Any, stage: DecoderStage) -> KeptStates:
    """Compute states of as many edits."""
    parts = []
    for start in range(0, stage.pictures, 64):
        batch = edits(stage.pictures_seed, "cache", start, 64, 1 / 3, stage.fonts)
        wanted = pictures([edit.result for edit in batch]).to(policy.device)
        tokens = policy.image_tokenizer.encode(wanted)
        shown, reference = policy.reference_of(pictures([edit.source for edit in batch]).to(policy.device))
        prompts = policy.encode_prompts([edit.instruction for edit in batch], shown)
        hidden = policy.trainable.hidden_states(*prompts, tokens)
        parts.append(KeptStates(hidden, policy.decoder.encode(wanted), tokens, reference))
    return join(parts)


def fit_decoder(policy: Any, stage: DecoderStage, seed: int, log: LogFn) -> None:
    """Train a connector and a transformer on the flow loss while the language model stays as it is.

    A decoder must first find out which of its conditions belongs where. Two linear probes, thrown away at the
    end, ask the projected condition of every token for its place and its code and so keep both readable."""
    device = policy.device
    torch.manual_seed(seed)
    decoder = policy.renew_decoder() if stage.renew else policy.decoder
    decoder.vae.requires_grad_(False).eval()
    editing = round(stage.batch_size * stage.edit_share)
    connectors = [decoder.require_edit()] if editing else []
    kept = [(kept_states(policy, stage), stage.batch_size - editing)]
    if editing:
        kept.append((kept_edits(policy, stage), editing))
    kept = [(states, size) for states, size in kept if size]
    quantizer, width = policy.image_tokenizer.quantizer, decoder.sana.config.cross_attention_dim
    places = torch.arange(kept[0][0].tokens.shape[1], device=device)
    probes = nn.ModuleDict(
        {"place": nn.Linear(width, len(places)), "code": nn.Linear(width, len(quantizer.levels))}
    )
    module = nn.ModuleList([decoder.connector, decoder.sana, probes.to(device), *connectors]).requires_grad_(
        True
    )
    draws = torch.Generator().manual_seed(seed)

    def losses_of(states: KeptStates, size: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(0, len(states.hidden), (size,), generator=draws).to(device)
        noise = torch.randn(size, *decoder.latent_shape, generator=draws).to(device)
        sigma = torch.rand(size, generator=draws).to(device)
        drop = (torch.rand(size, generator=draws) < stage.condition_dropout).to(device)
        hidden, latents = states.hidden[rows], states.latents[rows]
        reference = None if states.reference is None else states.reference[rows]
        flow = decoder.flow_loss(hidden, latents, sigma, noise, drop, reference)
        conditions = decoder.condition(hidden[~drop, 1:])
        place = F.cross_entropy(probes["place"](conditions).flatten(0, 1), places.repeat(len(conditions)))
        codes = quantizer.values(quantizer.digits_of(states.tokens[rows[~drop]])).float()
        return flow, place, F.mse_loss(probes["code"](conditions), codes)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
            parts = [losses_of(states, size) for states, size in kept]
        shares = [size / stage.batch_size for _, size in kept]
        flow, place, code = (
            sum((share * part for share, part in zip(shares, column, strict=True)), torch.zeros(()))
            for column in zip(*parts, strict=True)
        )
        metrics = {"flow": flow.item(), "place": place.item(), "code": code.item()}
        if editing:
            metrics["flow_edits"] = parts[-1][0].item()
        return flow + stage.place_weight * place + stage.code_weight * code, metrics

    fit("decoder", module, loss_of, stage, log)
