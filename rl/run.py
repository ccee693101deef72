"""A training run from its first step to its report: evaluation, pictures, checkpoints, resuming, stopping."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rl.budget import Budget
from rl.checkpoint import CHECKPOINTS, Checkpoint, latest_checkpoint, save_checkpoint, step_of
from rl.config import Recipe
from rl.engine import Engine, StateDict
from rl.errors import ImageRLError
from rl.evaluate import Evaluation, evaluate
from rl.files import is_temporary, write_atomic
from rl.metrics import METRICS_FILE, MetricsLog, Progress, image_grid, save_image, to_json
from rl.prompt_pictures import with_pictures
from rl.recipe import load_yaml_recipe
from rl.report import write_report
from rl.rollout import RolloutEngine
from rl.sft_config import AnyRecipe
from rl.stats import compare
from rl.trainer import Trainer
from rl.types import Prompt

RECIPE_FILE = "recipe.yaml"
MODEL = "model"  # what supervised training leaves
CONTENTS = {
    RECIPE_FILE,
    METRICS_FILE,
    CHECKPOINTS,
    MODEL,
    "environment.json",
    "report.html",
    "eval",
    "samples",
    "tb",
}
# What may change between a run and its continuation without making it another experiment.
CHANGEABLE = {
    *(
        "run.steps",
        "run.images",
        "run.minutes",
        "run.output_dir",
        "checkpoint.every",
        "checkpoint.keep",
        "rollout.max_logprob_diff",
    ),
    "algorithm.flow.max_logprob_diff",
    *(f"rewards.{key}" for key in ("workers", "timeout_s", "max_failure_rate", "max_restarts")),
    *("data.workers", "data.max_bad_share", "run.model_dtype"),
}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def refuse_run(self) -> None:
        """Raises ImageRLError when the folder already holds a run, or what is left of one."""
        if any((self.path / name).exists() for name in (RECIPE_FILE, METRICS_FILE, CHECKPOINTS)):
            raise ImageRLError(
                f"{self.path} already holds a run; add --resume to continue it, --overwrite to replace it, "
                "or set another run.output_dir"
            )

    def refuse_foreign(self) -> None:
        """Raises ImageRLError when the folder holds anything that no run writes: it is not ours to delete."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ImageRLError(f"{self.path} is a file, not a run folder; set another run.output_dir")
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in CONTENTS)
        if foreign := [name for name in foreign if not is_temporary(name)]:
            raise ImageRLError(
                f"{self.path} holds {foreign[0]}, which is no part of a run; --overwrite would delete it, so "
                "move it away or set another run.output_dir"
            )

    def resumable(self, recipe: AnyRecipe) -> Path | None:
        """The checkpoint to continue from; None when the run was stopped before its first, or never was.

        Raises ImageRLError when the folder belongs to another recipe, or to a longer run."""
        stored = self.path / RECIPE_FILE
        if stored.exists():
            changed = differing_keys(read_stored_recipe(stored, type(recipe)), recipe)
            if changed:
                raise ImageRLError(
                    f"{self.path} was started with another {changed[0]}; resume with the same recipe, "
                    "or set another run.output_dir"
                )
        newest = latest_checkpoint(self.checkpoints)
        if newest is not None and step_of(newest) > recipe.run.steps:
            raise ImageRLError(
                f"{self.path} is at step {step_of(newest)} already but run.steps is {recipe.run.steps}; "
                "raise run.steps or set another run.output_dir"
            )
        return newest

    def begin(self, recipe: AnyRecipe, overwrite: bool = False) -> None:
        """Write the recipe; with `overwrite` into an emptied folder."""
        if overwrite and self.path.exists():
            self.refuse_foreign()
            shutil.rmtree(self.path)
        write_atomic(self.path / RECIPE_FILE, recipe.to_yaml())

    def write_evaluation(self, evaluation: Evaluation, step: int, model: str, seed: int) -> None:
        text = to_json(evaluation.to_dict(step=step, model=model, seed=seed), indent=1)
        write_atomic(self.path / "eval" / f"{evaluation.suite}_step_{step:06d}.json", text + "\n")

    def write_comparison(self, comparison: Mapping[str, Any], suite: str, after_step: int) -> None:
        document = {
            "suite": suite,
            "before_step": 0,
            "after_step": after_step,
            "metrics": {
                name: {**entry, "difference": asdict(entry["difference"])}
                for name, entry in comparison.items()
            },
        }
        write_atomic(self.path / "eval" / "comparison.json", to_json(document, indent=1) + "\n")

    def save_grid(self, step: int, images: Sequence[Any], captions: Sequence[str]) -> None:
        scale = max(1, 192 // images[0].shape[1])
        grid = image_grid(images, columns=4, captions=captions, scale=scale)
        save_image(grid, self.path / "samples" / f"step_{step:06d}.png")


def with_sources(
    images: Sequence[np.ndarray], prompts: Sequence[Prompt]
) -> tuple[list[np.ndarray], list[str]]:
    """Pictures [H, W, 3] and their captions; before an edit's comes the picture that it starts from."""
    prompts = [with_pictures(prompt) for prompt in prompts]
    shown: list[np.ndarray] = []
    captions: list[str] = []
    for image, prompt in zip(images, prompts, strict=True):
        if prompt.reference is not None:
            source = prompt.reference.convert("RGB").resize((image.shape[1], image.shape[0]))
            shown.append(np.asarray(source))
            captions.append("to edit")
        shown.append(image)
        captions.append(prompt.text)
    return shown, captions


def read_stored_recipe(path: Path, schema: type[AnyRecipe]) -> AnyRecipe:
    return load_yaml_recipe(schema, path)


def differing_keys(stored: AnyRecipe, given: AnyRecipe) -> list[str]:
    """Dotted keys in which two recipes differ, those that may change left out."""

    def flat(
        values: Mapping[str, Any], prefix: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, (*prefix, key))
            else:
                yield (*prefix, key), value

    old, new = dict(flat(stored.model_dump())), dict(flat(given.model_dump()))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [key for key in map(".".join, keys) if key not in CHANGEABLE]


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only asks to stop; the yielded function tells whether one came. A
    second one interrupts at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if os.environ.get("RANK", "0") == "0":  # not by print, which this may have interrupted
            os.write(2, b"imagerl: stopping after this step; once more to stop at once\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stepper(Protocol):
    """What a loop drives: a `Trainer`."""

    engine: Engine

    def step(self, step: int) -> Mapping[str, Any]: ...


class Loop:
    """Drives a trainer over the steps of its recipe. Only the main process writes files."""

    def __init__(
        self,
        recipe: Any,
        folder: RunFolder,
        trainer: Stepper,
        checkpoint: Checkpoint | None,
        progress_note: Callable[[str], None] = print,
        budget: Budget | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.engine = trainer.engine
        self._step = trainer.step
        self.start_step = checkpoint.step if checkpoint else 0
        self.first: list[dict[str, Any]] | None = checkpoint.state.get("first_eval") if checkpoint else None
        self.last: list[dict[str, Any]] | None = checkpoint.state.get("last_eval") if checkpoint else None
        self.note = progress_note if self.engine.is_main else lambda _: None
        self.finished = False  # the last step is done
        self.budget = budget or Budget()
        self.budget.restore(checkpoint.state.get("budget", {}) if checkpoint else {})
        self.done = self.start_step  # steps

    def execute(self, resumed: bool) -> dict[str, Any] | None:
        """Run to the last step, or until asked to stop.

        Returns the comparison of the last held-out evaluation with the first; None when stopped early, and on
        all but the main process."""
        total = self.recipe.run.steps
        is_main = self.engine.is_main
        log = None
        if is_main:
            log = MetricsLog(self.folder.path, (self.start_step or -1) if resumed else None)
        with stop_on_signals() as asked_to_stop:
            if self.first is None:
                self._evaluate(0, log)
            with _progress(total, self.start_step, is_main) as progress:
                for step in range(self.start_step + 1, total + 1):
                    if self.budget.spent:
                        break
                    self.engine.share = self.budget.share
                    metrics = self._step(step - 1)
                    self.done = step
                    self.budget.spend(self.engine.gather_objects(metrics)[0])  # clocks differ
                    last = step == total or self.budget.spent
                    stopping = any(self.engine.gather_objects(asked_to_stop()))
                    if log:
                        log.log(step, metrics)
                    if progress:
                        progress.update(step, metrics, self.budget.expected_steps())
                    if self._due(step, self.recipe.eval.every) or last:
                        self._evaluate(step, log)
                    elif self._due(step, self.recipe.run.sample_every):
                        self._draw_samples(step)
                    if self._due(step, self.recipe.checkpoint.every) or last or stopping:
                        self._save(step)
                    if stopping and not last:
                        self.note(f"stopped after step {step}; continue with --resume")
                        self._finish(log, None)
                        return None
        self.finished = True
        comparison = compare(self.first or [], self.last or []) if is_main else None
        self._finish(log, comparison)
        return comparison

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _save(self, step: int) -> None:
        tensors, state = self._tensors(), self._state()
        if self.engine.is_main:
            save_checkpoint(self.folder.checkpoints, step, tensors, state, self.recipe.checkpoint.keep)
        self.engine.barrier()

    def _tensors(self) -> StateDict:
        """The tensors of a checkpoint, whole, on the main process. Collective."""
        return self.engine.state_dict()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors. Called by all processes, what the main one returns counts."""
        return {
            "first_eval": self.first,
            "last_eval": self.last,
            "recipe": self.recipe.model_dump(),
            "budget": self.budget.state(),
        }

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        """Held-out evaluation: sets `first` (once) and `last` on the main process."""
        raise NotImplementedError

    def _draw_samples(self, step: int) -> None:
        """A grid of the fixed prompts."""
        raise NotImplementedError

    def _finish(self, log: MetricsLog | None, comparison: Mapping[str, Any] | None) -> None:
        """At the end of the run, and with no comparison when it was stopped early."""
        raise NotImplementedError


class Run(Loop):
    """A run of reinforcement learning."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        trainer: Trainer,
        heldout: Sequence[Prompt],
        eval_rollout: RolloutEngine,
        checkpoint: Checkpoint | None,
        progress_note: Callable[[str], None] = print,
    ) -> None:
        super().__init__(recipe, folder, trainer, checkpoint, progress_note, Budget.of(recipe))
        self.trainer = trainer
        self.heldout = heldout[: recipe.eval.size]
        self.eval_rollout = eval_rollout

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        """Held-out evaluation on the main process; the others wait at the next collective."""
        with self.engine.gathered_parameters():
            self.trainer.policy.refresh_sampler()
        if not self.engine.is_main:
            self.engine.barrier()
            return
        settings = self.recipe.eval
        evaluation = evaluate(
            settings.suite, self.heldout, self.eval_rollout, self.trainer.scorer, settings.batch_size
        )
        self.folder.write_evaluation(evaluation, step, self.recipe.model.path, settings.seed)
        self.first = self.first or evaluation.per_prompt
        self.last = evaluation.per_prompt
        if log:
            log.log(step, evaluation.flat())
        shown = "  ".join(f"{n} {v.mean:.3f}" for n, v in evaluation.metrics.items())
        self.note(f"held-out after step {step}: {shown}")
        count = self.recipe.run.sample_prompts
        self.folder.save_grid(step, *with_sources(list(evaluation.images[:count]), self.heldout[:count]))
        self.engine.barrier()

    def _draw_samples(self, step: int) -> None:
        """The grid's prompts are the first of the held-out ones, with the random numbers of the evaluation."""
        with self.engine.gathered_parameters():
            self.trainer.policy.refresh_sampler()
        if self.engine.is_main:
            prompts = self.heldout[: self.recipe.run.sample_prompts]
            occasion = f"eval {self.recipe.eval.suite}"
            (groups,) = self.eval_rollout.generate(prompts, 1, occasion)
            self.folder.save_grid(step, *with_sources([group.images[0] for group in groups], prompts))

    def _tensors(self) -> StateDict:
        return self.engine.state_dict() | self.trainer.tensors()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "trainer": self.trainer.state()}

    def _finish(self, log: MetricsLog | None, comparison: Mapping[str, Any] | None) -> None:
        if log is None:
            return
        log.close()
        if comparison is not None:
            self.folder.write_comparison(comparison, self.recipe.eval.suite, self.done)
        self.note(f"report: {write_report(self.folder.path)}")


@contextmanager
def _progress(total: int, start: int, show: bool) -> Iterator[Progress | None]:
    if not show:
        yield None
        return
    with Progress(total, start) as progress:
        yield progress
