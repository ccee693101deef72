"""The training step of supervised fine-tuning: samples to batches, batches to one update (arXiv 2510.15857)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagerl.models.base import Lessons, Policy, SupervisedScores
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.data.image_data import Drawn, ImageStream
from imagerl.rl.data.image_files import REASONS, Example
from imagerl.rl.data.seeding import generator
from imagerl.rl.engine.engine import Engine
from imagerl.rl.training.step_metrics import PhaseTimer
from imagerl.rl.types import Prompt, Rows


@dataclass(slots=True)
class SFTBatch:
    """The inputs of the losses of B samples."""

    prompts: Rows  # [B, ...] as the policy encodes them
    targets: Rows  # {"tokens": [B, T], ...} as the family predicts them
    draws: Rows  # {"uniform": [B], "drop": [B] bool, "noise": [B, C, h, w] where the canvas has noise}

    def inputs(self) -> tuple[Rows, Rows, Rows]:
        return self.prompts, self.targets, self.draws


class Collator:
    """Turns samples into batches: prompts and targets by the frozen parts, and random numbers."""

    def __init__(self, policy: Policy, lessons: Lessons, engine: Engine) -> None:
        self.policy = policy
        self.lessons = lessons
        self.engine = engine

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[Example], randomness: Sequence[torch.Generator], dropout: float = 0.0
    ) -> SFTBatch:
        """Return a batch whose random numbers come from one generator a sample: σ, then dropping, then noise."""
        policy, prompts = self.policy, prompts_of(examples)
        pictures = to_pixels([example.picture for example in examples]).to(policy.device)
        with self.engine.autocast():
            targets = self.lessons.targets(prompts, pictures)
        # The order of these draws is part of a run: another one would give other noise to every sample.
        draws = {"uniform": torch.stack([torch.rand((), generator=g) for g in randomness])}
        draws["drop"] = torch.stack([torch.rand((), generator=g) for g in randomness]) < dropout
        shape = policy.prompts.canvas(prompts[0]).noise
        if shape is not None:
            draws["noise"] = torch.stack([torch.randn(shape, generator=g) for g in randomness])
        draws = {name: rows.to(policy.device) for name, rows in draws.items()}
        return SFTBatch(policy.encode(prompts), targets, draws)


def prompts_of(examples: Sequence[Example]) -> list[Prompt]:
    """Return captions, or edits with what they start from, as the policy encodes them."""
    return [
        Prompt(
            place,
            one.caption,
            {} if one.reference is None else {"reference": Image.fromarray(one.reference)},
            source="caption",
        )
        for place, one in enumerate(examples)
    ]


def of_one_kind(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Return places of the examples in parts of at most `size`, captions and edits apart: prompts and conditions have
    other lengths."""
    kinds: tuple[list[int], list[int]] = ([], [])
    for place, example in enumerate(examples):
        kinds[example.reference is not None].append(place)
    return [kind[start : start + size] for kind in kinds for start in range(0, len(kind), size)]


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Turn [H, W, 3] uint8 each into [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


class SFTTrainer:
    """Takes one optimizer step at a time over a stream of samples."""

    def __init__(
        self, recipe: SFTRecipe, lessons: Lessons, stream: ImageStream, collate: Collator, engine: Engine
    ) -> None:
        self.recipe = recipe
        self.lessons = lessons
        self.module = lessons.trainable
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
            batches = self._batches(drawn)
        with self.timer("update"):
            metrics = self._update(batches)
        timing = self.timer.metrics()
        rate = self.recipe.data.batch_size / timing["time/step_s"]
        return metrics | self._data_metrics() | timing | {"images_per_s": rate}

    def _batches(self, drawn: Sequence[Drawn]) -> list[SFTBatch]:
        """Split this process's samples into microbatches."""
        seed, dropout = self.recipe.run.seed, self.recipe.objective.condition_dropout
        batches = []
        for places in of_one_kind([one.example for one in drawn], self.recipe.engine.micro_batch_size):
            part = [drawn[place] for place in places]
            randomness = [generator(seed, "flow", one.number) for one in part]
            batches.append(self.collate([one.example for one in part], randomness, dropout))
        return batches

    def _update(self, batches: Sequence[SFTBatch]) -> dict[str, float]:
        # Every rank takes part in as many rounds as the busiest: gradients are exchanged in the last one.
        rounds = max(
            self.engine.gather_objects(len(batches))
        )  # a mix of kinds may divide less well elsewhere
        counted = torch.cat([self.counted(batch) for batch in batches]).sum(0).tolist()
        # One denominator for the whole batch, so that neither microbatches nor ranks change the loss.
        totals = self.engine.sum_over_ranks(dict(zip(("image", "prompt"), counted, strict=True)))
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for number in range(rounds):
            batch = batches[min(number, len(batches) - 1)]
            with self.engine.microbatch(last=number == rounds - 1):
                with self.engine.autocast():
                    scores = self.engine.module(*batch.inputs())
                if number >= len(batches):
                    # An extra round counts for nothing, but its backward pass must happen for the others.
                    scores = SupervisedScores(*(0.0 * values for values in scores))
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
        }
        if self.recipe.objective.flow_weight:
            metrics["flow"] = summed["flow"] / self.recipe.data.batch_size
        if totals["prompt"]:
            metrics["prompt_cross_entropy"] = summed["prompt_nll"] / totals["prompt"]
        return metrics | {"grad_norm": grad_norm, "lr": self.engine.lr}

    def counted(self, batch: SFTBatch) -> Tensor:
        """Count the predicted positions of images and of prompts of a batch, [B, 2]."""
        return self.lessons.counted(batch.prompts, batch.targets["tokens"])

    def _loss(self, scores: SupervisedScores, positions: float, samples: float) -> Tensor:
        """Return the share of samples in the loss of a batch: means over its predicted tokens and over its pictures."""
        weights = self.recipe.objective
        nll = (scores.image_nll + scores.prompt_nll).sum() / positions
        return weights.cross_entropy_weight * nll + weights.flow_weight * scores.flow.sum() / samples

    def _data_metrics(self) -> dict[str, float]:
        counted = self.stream.counts
        own = {"data/seen": float(counted.seen), "data/bad": float(counted.bad.total())}
        own |= {f"data/bad/{reason}": float(counted.bad[reason]) for reason in REASONS}
        totals = self.engine.sum_over_ranks(own)
        # After bad samples ranks may be a draw apart; the furthest says which epoch it is.
        epoch = max(self.engine.gather_objects(self.stream.epoch))
        shown = {key: value for key, value in totals.items() if value or key in ("data/seen", "data/bad")}
        return {"data/epoch": float(epoch), **shown}

    @torch.no_grad()
    def measure(self, batch: SFTBatch) -> list[dict[str, float]]:
        """Return the losses of each sample of a batch. Within `engine.gathered_parameters`."""
        self.module.eval()
        with self.engine.autocast():
            scores = self.module(*batch.inputs())
        rows = []
        for row, (image, prompt) in enumerate(self.counted(batch).tolist()):
            one = SupervisedScores(*(values[row : row + 1] for values in scores))
            losses = {
                "cross_entropy": float(one.image_nll) / image
            }  # alphabetical, as they come back from a checkpoint
            if self.recipe.objective.flow_weight:
                losses["flow"] = float(one.flow)
            losses["loss"] = float(self._loss(one, image + prompt, 1))
            if prompt:
                losses["prompt_cross_entropy"] = float(one.prompt_nll) / prompt
            rows.append(losses)
        return rows
