"""A run of supervised fine-tuning: held-out losses, grids, checkpoints with the place in the data, the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.data.image_files import Example
from imagerl.rl.data.seeding import generator
from imagerl.rl.engine.checkpoint import Checkpoint
from imagerl.rl.evaluation.evaluate import Evaluation
from imagerl.rl.evaluation.stats import Comparison, results_table, summarise
from imagerl.rl.files.writing import atomic_folder
from imagerl.rl.rollout.engine import RolloutEngine, to_uint8
from imagerl.rl.run.folder import MODEL, RunFolder
from imagerl.rl.run.loop import Loop
from imagerl.rl.sft.trainer import SFTBatch, SFTTrainer, of_one_kind, prompts_of

SUITE = "heldout"


class SFTRun(Loop):
    """`execute` also leaves the trained model in the run folder, once the last step is done."""

    recipe: SFTRecipe

    def __init__(
        self,
        recipe: SFTRecipe,
        folder: RunFolder,
        trainer: SFTTrainer,
        heldout: Sequence[Example],
        rollout: RolloutEngine,
        checkpoint: Checkpoint | None,
        save_model: Callable[[Path], None],
    ) -> None:
        super().__init__(recipe, folder, trainer, checkpoint)
        self.trainer = trainer
        self.rollout = rollout
        self.save_model = save_model
        self.captions = [example.caption for example in heldout]
        self.drawn = heldout[: recipe.run.sample_prompts]
        self._batches = self._own_batches(heldout)

    def _own_batches(self, heldout: Sequence[Example]) -> list[tuple[list[int], SFTBatch]]:
        """Encode this process's held-out samples once, with their numbers; the same noise at every evaluation."""
        own = list(range(self.engine.rank, len(heldout), self.engine.world_size))
        batches = []
        for places in of_one_kind([heldout[n] for n in own], self.recipe.engine.micro_batch_size):
            numbers = [own[place] for place in places]
            randomness = [generator(self.recipe.eval.seed, "held-out flow", number) for number in numbers]
            batches.append((numbers, self.trainer.collate([heldout[n] for n in numbers], randomness)))
        return batches

    def execute(self, resumed: bool) -> Comparison | None:
        comparison = super().execute(resumed)
        if self.finished:
            with self.engine.averaged(), self.engine.gathered_parameters():
                if self.engine.is_main:
                    with atomic_folder(self.folder.path / MODEL, replace=True) as folder:
                        self.save_model(folder)
                    self.note(f"model: {self.folder.path / MODEL}")
                self.engine.barrier()
        return comparison

    def _state(self) -> dict[str, object]:
        return super()._state() | {"data": self.engine.gather_objects(self.trainer.stream.state())}

    def _evaluate(self, step: int) -> None:
        rows: list[dict[str, Any]] = []
        with self.engine.averaged(), self.engine.gathered_parameters():
            for numbers, batch in self._batches:
                for number, losses in zip(numbers, self.trainer.measure(batch), strict=True):
                    rows.append({"index": number, "prompt": self.captions[number], **losses})
            everyone = self.engine.gather_objects(rows)
            if self.engine.is_main:
                gathered = [row for own in everyone for row in own]
                self._record(step, sorted(gathered, key=lambda row: row["index"]))
                self._draw(step)
            self.engine.barrier()

    def _record(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.first = rows if self.first is None else self.first
        self.last = rows
        if not rows:
            return
        evaluation = Evaluation(SUITE, summarise(rows), rows, [])
        self.folder.write_evaluation(evaluation, step, self.recipe.model.path, self.recipe.eval.seed)
        self._write(step, evaluation.flat())
        shown = "  ".join(f"{name.replace('_', ' ')} {v.mean:.4f}" for name, v in evaluation.metrics.items())
        self.note(f"held-out after step {step}: {shown}")

    def _draw_samples(self, step: int) -> None:
        with self.engine.averaged(), self.engine.gathered_parameters():
            if self.engine.is_main:
                self._draw(step)
            self.engine.barrier()

    def _draw(self, step: int) -> None:
        """Draw a grid of the first held-out captions, on the main process, parameters gathered."""
        if not self.drawn:
            return
        self.trainer.module.eval()
        self.rollout.policy.refresh_sampler()
        images: dict[int, np.ndarray] = {}
        for places in of_one_kind(self.drawn, len(self.drawn)):
            images |= zip(places, self._pictures(places), strict=True)
        captions = self.captions[: len(images)]
        self._show(step, [images[place] for place in sorted(images)], captions)

    @torch.no_grad()
    def _pictures(self, places: list[int]) -> np.ndarray:
        """Draw [B, H, W, 3] uint8 of some held-out captions, or of edits, with random numbers of their own."""
        policy, sampling = self.rollout.policy, self.rollout.sampling
        examples = prompts_of([self.drawn[place] for place in places])
        prompts = [replace(prompt, index=place) for place, prompt in zip(places, examples, strict=True)]
        uniforms, noise = self.rollout.uniforms(SUITE, prompts, 1), self.rollout.noise(SUITE, prompts, 1)
        rows = policy.encode(prompts)
        trajectory = policy.sample_tokens(rows, uniforms, sampling)
        with self.engine.autocast():
            pictures = policy.decode(rows, trajectory, noise, sampling)
        return to_uint8(pictures)

    def _finish(self, comparison: Comparison | None) -> None:
        if comparison and self.engine.is_main:
            self.folder.write_comparison(comparison, SUITE, self.done)
            self.trackers.table(self.done, *results_table(comparison))
