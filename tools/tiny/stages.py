"""Supervised training of the tiny models: the one loop of all stages, and the stages of a model that draws."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagerl.rl.config.engine import EngineConfig
from imagerl.rl.data.seeding import generator
from imagerl.rl.engine.engine import Engine
from tools.tiny.config import GeneratorStage, StageConfig
from tools.tiny.samples import pictures, samples

LogFn = Callable[[str, int, dict[str, float]], None]
LossFn = Callable[[int], tuple[Tensor, dict[str, float]]]


class ARHalf(Protocol):
    """The part of `models.blip3o_next.ar.ARPolicy` that pretraining uses."""

    lm: Any
    vocabulary: Any

    def hidden_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor: ...


def fit(
    name: str, module: nn.Module, loss_of: LossFn, stage: StageConfig, log: LogFn, every: int = 50
) -> None:
    """Minimise `loss_of(step)` over the module's trainable parameters, by the updates of every other run.

    Raises ImageRLError when the gradient is not finite."""
    device = next(module.parameters()).device
    engine = Engine(EngineConfig(device="cuda" if device.type == "cuda" else "cpu"))
    # fused: as the shipped models were trained; another kernel rounds otherwise
    engine.prepare(module, stage.optim(), stage.steps, fused=True)
    module.train()
    started = time.perf_counter()
    for step in range(stage.steps):
        loss, metrics = loss_of(step)
        engine.backward(loss)
        norm = engine.step()
        if step % every == 0 or step == stage.steps - 1:
            seconds = time.perf_counter() - started
            rate = (step + 1) * stage.batch_size / seconds
            values = {"loss": loss.item(), **metrics, "grad_norm": norm}
            log(name, step, {**values, "images_per_s": rate, "time_minutes": seconds / 60})
    module.eval()


def show(stage: str, step: int, values: dict[str, float]) -> None:
    """Print how far a stage is."""
    print(f"{stage} {step}: loss {values['loss']:.4f}, {values['images_per_s']:.0f} pictures/s", flush=True)


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Add L1, which keeps edges sharp, and L2, which punishes the few pixels far off: strokes need both."""
    difference = drawn.float() - wanted
    return difference.abs().mean() + difference.square().mean()


def fit_reconstruction(
    name: str,
    module: nn.Module,
    reconstruct: Callable[[Tensor], Tensor],
    stage: StageConfig,
    seed: int,
    device: torch.device,
    log: LogFn,
) -> None:
    """Train a tokenizer or an autoencoder to draw its input again."""

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        wanted = pictures(samples(seed, name, step, stage.batch_size, stage)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
            drawn = reconstruct(wanted)
        return reconstruction_loss(drawn, wanted), {}

    fit(name, module, loss_of, stage, log)


@torch.no_grad()
def latent_scale(
    encode: Callable[[Tensor], Tensor], stage: StageConfig, seed: int, device: torch.device
) -> float:
    """Return 1 / standard deviation of the latents over 512 pictures: flow matching wants data of the noise's size."""
    latents = encode(pictures(samples(seed, "latent scale", 0, 512, stage)).to(device))
    return 1.0 / latents.float().std().item()


def token_loss(ar: ARHalf, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy over the whole vocabulary of the image tokens and of the closing `<im_end>`."""
    ids = tokens + ar.vocabulary.image_start_token_id
    end = torch.full_like(ids[:, :1], ar.vocabulary.image_end_tag_id)
    logits = ar.lm.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), torch.cat([ids, end], dim=1).flatten())


def fit_generator(
    name: str,
    policy: Any,
    stage: GeneratorStage,
    seed: int,
    log: LogFn,
    on_snapshot: Callable[[int], None] = lambda step: None,
) -> None:
    """Train by cross-entropy on tokens plus flow loss, gradients of both into the language model (arXiv 2510.15857).

    The decoder sees the hidden states that inference will give it: those of `<S0>` and of every token. The flow
    loss is taken on the first `flow_share` of the batch, to spend the time where learning is slow."""
    ar, decoder, tokenizer = policy.trainable, policy.decoder, policy.image_tokenizer
    device = policy.device
    for frozen in (decoder.vae, tokenizer):
        frozen.requires_grad_(False).eval()
    module = nn.ModuleList([ar, decoder])
    flowing = max(1, round(stage.batch_size * stage.flow_share))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        if step and step % stage.snapshot_every == 0:
            module.eval()
            on_snapshot(step)
            module.train()
        batch = samples(seed, name, step, stage.batch_size, stage)
        wanted = pictures(batch).to(device)
        prompt_ids, prompt_mask = policy.encode_prompts([scene.caption for scene in batch])
        random_numbers = generator(seed, "flow", step)
        noise = torch.randn(flowing, *decoder.latent_shape, generator=random_numbers).to(device)
        sigma = torch.rand(flowing, generator=random_numbers).to(device)
        drop = (torch.rand(flowing, generator=random_numbers) < stage.condition_dropout).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
            tokens = tokenizer.encode(wanted)
            latents = decoder.encode(wanted[:flowing]).float()
            hidden = ar.hidden_states(prompt_ids, prompt_mask, tokens)
            flow = decoder.flow_loss(hidden[:flowing], latents, sigma, noise, drop)
            cross_entropy = token_loss(ar, hidden, tokens)
        loss = cross_entropy + stage.flow_weight * flow
        return loss, {"cross_entropy": cross_entropy.item(), "flow": flow.item()}

    fit(name, module, loss_of, stage, log)
