"""Supervised fine-tuning with the published objective (arXiv 2510.15857): cross-entropy on the image tokens plus the
flow-matching loss, the gradient of both into the language model.

The decoder is trained on the hidden states that inference will give it: those of `<S0>` and of every token. The
public trainer selects others, about three positions later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rl.engine import Engine
from rl.image_data import Drawn, ImageStream
from rl.image_files import REASONS, Example
from rl.metrics import PhaseTimer
from rl.seeding import derive_seed, generator
from rl.sft_config import SFTRecipe, TrainedConfig

MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once: 128 MiB, whatever the vocabulary


class SFTScores(NamedTuple):
    """Losses of B samples, each [B] float32: sums of −log p over tokens, and the mean squared flow residual."""

    image_nll: Tensor  # over the T image tokens and the closing `<im_end>`
    prompt_nll: Tensor  # over the prompt's own tokens; 0 when it is not trained on
    flow: Tensor


@dataclass(slots=True)
class SFTBatch:
    """What the losses of B samples are computed from."""

    prompt_ids: Tensor  # [B, L] left-padded, ending in <im_start><S0>
    prompt_mask: Tensor  # [B, L] bool
    tokens: Tensor  # [B, T] 0-based image tokens
    latents: Tensor  # [B, C, h, w] float32
    sigma: Tensor  # [B]
    noise: Tensor  # [B, C, h, w]
    drop: Tensor  # [B] bool: the condition is the unconditional one

    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.prompt_ids,
            self.prompt_mask,
            self.tokens,
            self.latents,
            self.sigma,
            self.noise,
            self.drop,
        )


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """−log p of ids `targets` [N] after hidden states [N, D] under the whole vocabulary of `head` [V, D], in float32.
    Memory is one chunk of logits; chunks are recomputed in the backward pass."""

    def chunk(rows: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, head).float(), ids, reduction="none")

    size = max(1, MAX_LOGITS_PER_CHUNK // head.shape[0])
    parts = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(parts) == 1:
        return chunk(*parts[0])
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def prompt_targets(prompt_ids: Tensor, prompt_mask: Tensor, image_columns: slice) -> tuple[Tensor, Tensor]:
    """What positions 0..L−2 of a prompt should predict, and which of them count: [B, L − 1] ids and bools. Padding does
    not count, nor do image tokens: in a prompt they are those of a reference picture, given and not drawn."""
    following = prompt_ids[:, 1:]
    given = (following >= image_columns.start) & (following < image_columns.stop)
    return following, prompt_mask[:, :-1].bool() & ~given


def noise_levels(uniform: Tensor, shift: float) -> Tensor:
    """Uniform numbers in [0, 1) to σ, shifted as the scheduler's own schedule is (arXiv 2403.03206, eq. 23)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


class SFTModule(nn.Module):
    """All that can train, in one module for the engine: language model, connector, flow transformer. The autoencoder
    stays outside."""

    def __init__(self, policy: Any, on_prompt: bool, with_flow: bool) -> None:
        super().__init__()
        self.ar = policy.trainable
        parts = {name: part for name, part in policy.decoder.named_children() if name != "vae"}
        self.decoder = nn.ModuleDict(parts)
        self.on_prompt = on_prompt
        self.with_flow = with_flow
        self._flow = (policy.decoder,)  # in a tuple: its parts are registered above

    def choose(self, trained: TrainedConfig, seed: int) -> None:
        """Give gradients to what the recipe trains, and to nothing else."""
        self.requires_grad_(False)
        if trained.ar == "lora":
            lora = trained.lora
            torch.manual_seed(derive_seed(seed, "lora"))  # adapters begin at random
            self.ar.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
        for name, parameter in self.named_parameters():
            how = getattr(trained, part_of(name))
            if how == "full" or (how == "caption" and "caption_" in name):
                parameter.requires_grad_(True)
        if trained.gradient_checkpointing:
            self.ar.lm.activation_checkpointing_enable({"use_reentrant": False})
            self.decoder["sana"].enable_gradient_checkpointing()

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        tokens: Tensor,
        latents: Tensor,
        sigma: Tensor,
        noise: Tensor,
        drop: Tensor,
    ) -> SFTScores:
        ar = self.ar
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in ar.parameters())
        with torch.set_grad_enabled(learns):
            states = ar.sequence_states(prompt_ids, prompt_mask, tokens)
            hidden = states[:, prompt_ids.shape[1] - 1 :]
            head = ar.lm.lm_head.weight
            end = torch.full_like(tokens[:, :1], ar.vocabulary.image_end_tag_id)
            ids = torch.cat([tokens + ar.vocabulary.image_start_token_id, end], dim=1)
            image = token_nll(hidden.flatten(0, 1), head, ids.flatten()).view_as(ids).sum(1)
            prompt = torch.zeros_like(image)
            if self.on_prompt:
                following, counted = prompt_targets(prompt_ids, prompt_mask, ar.vocabulary.columns)
                before = states[:, : prompt_ids.shape[1] - 1]
                nll = token_nll(before[counted], head, following[counted])
                prompt = nll.new_zeros(counted.shape).masked_scatter(counted, nll).sum(1)
        flow = torch.zeros_like(image)
        if self.with_flow:
            residual = self._flow[0].flow_residual(hidden, latents, sigma, noise, drop)
            flow = residual.square().flatten(1).mean(1)
        return SFTScores(image, prompt, flow)


def part_of(name: str) -> str:
    """Which of ar, connector and decoder a parameter of `SFTModule` belongs to."""
    if name.startswith("ar."):
        return "ar"
    return "decoder" if name.startswith("decoder.sana.") else "connector"


class Collator:
    """Samples to batches: prompts, tokens and latents by the frozen parts, and random numbers."""

    def __init__(self, policy: Any, engine: Engine) -> None:
        self.policy = policy
        self.engine = engine

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[Example], randomness: Sequence[torch.Generator], dropout: float = 0.0
    ) -> SFTBatch:
        """A batch whose random numbers come from one generator a sample: σ, then dropping, then noise."""
        policy, decoder = self.policy, self.policy.decoder
        prompt_ids, prompt_mask = policy.encode_prompts([example.caption for example in examples])
        pictures = to_pixels([example.picture for example in examples]).to(policy.device)
        tokens = policy.image_tokenizer.encode(pictures)
        with self.engine.autocast():
            latents = decoder.encode(pictures).float()
        uniform = torch.stack([torch.rand((), generator=g) for g in randomness])
        drop = torch.stack([torch.rand((), generator=g) for g in randomness]) < dropout
        noise = torch.stack([torch.randn(decoder.latent_shape, generator=g) for g in randomness])
        sigma = noise_levels(uniform, float(decoder.scheduler_config.get("shift", 1.0)))
        random_part = (part.to(policy.device) for part in (sigma, noise, drop))
        return SFTBatch(prompt_ids, prompt_mask, tokens, latents, *random_part)


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_size(policy: Any) -> tuple[int, int]:
    """(height, width) of the pictures that the decoder draws."""
    scale = policy.decoder.vae.spatial_compression_ratio
    return policy.latent_shape[1] * scale, policy.latent_shape[2] * scale


class SFTTrainer:
    """One optimizer step at a time over a stream of samples."""

    def __init__(
        self, recipe: SFTRecipe, module: SFTModule, stream: ImageStream, collate: Collator, engine: Engine
    ) -> None:
        self.recipe = recipe
        self.module = module
        self.stream = stream
        self.collate = collate
        self.engine = engine
        self.timer = PhaseTimer(torch.cuda.synchronize if engine.device.type == "cuda" else None)

    def step(self, step: int) -> dict[str, float]:
        """Train on the next `data.batch_size` samples; returns what to log."""
        self.timer.start()
        with self.timer("data"):
            drawn = self.stream.take(self.recipe.data.batch_size // self.engine.world_size)
        with self.timer("encode"):
            batches = [self._collated(part) for part in self._microbatches(drawn)]
        with self.timer("update"):
            metrics = self._update(batches)
        timing = self.timer.metrics()
        rate = self.recipe.data.batch_size / timing["time/step_s"]
        return metrics | self._data_metrics() | timing | {"images_per_s": rate}

    def _microbatches(self, drawn: Sequence[Drawn]) -> list[Sequence[Drawn]]:
        size = self.recipe.engine.micro_batch_size
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    def _collated(self, drawn: Sequence[Drawn]) -> SFTBatch:
        seed = self.recipe.run.seed
        randomness = [generator(seed, "flow", one.number) for one in drawn]
        dropout = self.recipe.objective.condition_dropout
        return self.collate([one.example for one in drawn], randomness, dropout)

    def _update(self, batches: Sequence[SFTBatch]) -> dict[str, float]:
        own = {
            name: sum(counts(self.module, batch)[name] for batch in batches) for name in ("image", "prompt")
        }
        totals = self.engine.sum_over_ranks(own)
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for number, batch in enumerate(batches, 1):
            with self.engine.microbatch(last=number == len(batches)):
                with self.engine.autocast():
                    scores = self.engine.module(*batch.inputs())
                loss = self._loss(scores, totals["image"] + totals["prompt"], self.recipe.data.batch_size)
                self.engine.backward(loss)
            for name, value in {"loss": loss, **scores._asdict()}.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu().sum()
                )
        grad_norm = self.engine.step()
        summed = self.engine.sum_over_ranks(sums)
        metrics = {
            "loss": summed["loss"],
            "cross_entropy": summed["image_nll"] / totals["image"],
            "flow": summed["flow"] / self.recipe.data.batch_size,
        }
        if totals["prompt"]:
            metrics["prompt_cross_entropy"] = summed["prompt_nll"] / totals["prompt"]
        return metrics | {"grad_norm": grad_norm, "lr": self.engine.lr}

    def _loss(self, scores: SFTScores, positions: float, samples: float) -> Tensor:
        """Share of some samples in the loss of a batch: means over its predicted tokens and over its pictures."""
        weights = self.recipe.objective
        nll = (scores.image_nll + scores.prompt_nll).sum() / positions
        return weights.cross_entropy_weight * nll + weights.flow_weight * scores.flow.sum() / samples

    def _data_metrics(self) -> dict[str, float]:
        counted = self.stream.counts
        own = {"data/seen": float(counted.seen), "data/bad": float(counted.bad.total())}
        own |= {f"data/bad/{reason}": float(counted.bad[reason]) for reason in REASONS}
        totals = self.engine.sum_over_ranks(own)
        epoch = max(self.engine.gather_objects(self.stream.epoch))
        shown = {key: value for key, value in totals.items() if value or key in ("data/seen", "data/bad")}
        return {"data/epoch": float(epoch), **shown}

    @torch.no_grad()
    def measure(self, batch: SFTBatch) -> list[dict[str, float]]:
        """Losses of each sample of a batch. Within `engine.gathered_parameters`."""
        self.module.eval()
        with self.engine.autocast():
            scores = self.module(*batch.inputs())
        rows = []
        for row in range(len(batch.tokens)):
            one = SFTScores(*(values[row : row + 1] for values in scores))
            counted = counts(self.module, batch, row)
            positions = counted["image"] + counted["prompt"]
            losses = {  # alphabetical, as they come back from a checkpoint
                "cross_entropy": float(one.image_nll) / counted["image"],
                "flow": float(one.flow),
                "loss": float(self._loss(one, positions, 1)),
            }
            if counted["prompt"]:
                losses["prompt_cross_entropy"] = float(one.prompt_nll) / counted["prompt"]
            rows.append(losses)
        return rows


def counts(module: SFTModule, batch: SFTBatch, row: int | None = None) -> Mapping[str, int]:
    """Predicted positions of a batch, or of one of its rows: of the image (with its end) and of the prompt."""
    rows = slice(None) if row is None else slice(row, row + 1)
    tokens = batch.tokens[rows]
    prompt = 0
    if module.on_prompt:
        columns = module.ar.vocabulary.columns
        prompt = int(prompt_targets(batch.prompt_ids[rows], batch.prompt_mask[rows], columns)[1].sum())
    return {"image": tokens.numel() + len(tokens), "prompt": prompt}
