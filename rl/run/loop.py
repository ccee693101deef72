"""A training run from its first step to its report: evaluation, pictures, checkpoints, resuming, stopping."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np

from imagerl.rl.config.sft import AnyRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.checkpoint import Checkpoint
from imagerl.rl.engine.engine import Engine, StateDict, on_host
from imagerl.rl.engine.saving import Saver, Snapshot
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.evaluate import Evaluation, evaluate, kl_to_reference, try_rewards
from imagerl.rl.evaluation.kept_pictures import with_sources
from imagerl.rl.evaluation.stats import Comparison, compare, results_table
from imagerl.rl.evaluation.temperatures import AtTemperatures, Rows, compare_at_best, told_at_best
from imagerl.rl.files.metrics import MetricsLog, Progress
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.run.budget import Budget
from imagerl.rl.run.folder import PEAK, RunFolder
from imagerl.rl.run.monitors import Watch, watched
from imagerl.rl.run.report import LivePage, write_report
from imagerl.rl.run.signals import Stopping
from imagerl.rl.run.trackers import Trackers
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import Prompt


class Stepper(Protocol):
    """The object that a loop drives: a `Trainer`."""

    engine: Engine

    def step(self, step: int) -> Mapping[str, float]: ...


class Loop:
    """Drives a trainer over the steps of its recipe. Only the main process writes files."""

    def __init__(
        self,
        recipe: AnyRecipe,
        folder: RunFolder,
        trainer: Stepper,
        checkpoint: Checkpoint | None,
        budget: Budget | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.engine = trainer.engine
        self._step = trainer.step
        state = checkpoint.state if checkpoint else {}
        self.start_step = checkpoint.step if checkpoint else 0
        self.first: list[dict[str, object]] | None = state.get("first_eval")
        self.last: list[dict[str, object]] | None = state.get("last_eval")
        self.note = print if self.engine.is_main else lambda _: None
        self.finished = False  # the last step is done, or there shall be no further one
        self.budget = budget or Budget()
        self.budget.restore(state.get("budget", {}))
        self.done = self.start_step  # steps
        # step whose evaluation or grid was last done; a run may be stopped before that
        self.looked = state.get("looked", self.start_step)
        self.kept: Snapshot | None = None  # of the last finished step
        self.saver = Saver()
        self.log: MetricsLog | None = None  # of the main process, while it runs
        self.trackers = Trackers()

    def execute(self, resumed: bool) -> Comparison | None:
        """Run to the last step, or until asked to stop.

        Returns the comparison of the last held-out evaluation with the first; None when stopped early, and on
        all but the main process.

        Raises:
            ImageRLError: other processes of the run are gone, among what may go wrong in a step. The last finished
                step is saved.
        """
        with contextlib.closing(self.saver), self._reporting((self.start_step or -1) if resumed else None):
            return self._execute()

    def _execute(self) -> Comparison | None:
        stopping = Stopping(self.recipe.checkpoint.grace_s, self._rescue, self._leave)
        try:
            with stopping:  # while the last step is saved too: launchers stop all when one process ends
                self.finished = self._driven(stopping)
                return self._conclude()
        except KeyboardInterrupt:
            if not stopping.given_up:
                raise
        return self._conclude()

    def _driven(self, stopping: Stopping) -> bool:
        """Do what `_drive` does; whatever goes wrong, the last finished step is saved."""
        try:
            return self._drive(stopping)
        except Exception as error:
            self._rescue()
            if self._rescued() and self.kept:
                self.note(f"step {self.kept.step} is saved; continue with --resume")
            if lost := self.engine.lost_others(error):
                raise ImageRLError(f"{lost}; continue with --resume") from error
            raise

    def _conclude(self) -> Comparison | None:
        """Finish a run that is done, or was stopped; see `execute`."""
        if not self.finished:
            self.saver.wait()
            self.note(self._where_stopped())
        done = self.engine.is_main and self.finished
        comparison = compare(self.first or [], self.last or []) if done else None
        self._finish(comparison)
        self.saver.wait()
        return comparison

    def _drive(self, stopping: Stopping) -> bool:
        """Take the steps. Returns whether the last one is done; else the run was asked to stop."""
        total = self.recipe.run.steps
        if self.first is None:
            self._evaluate(0)
        elif self.looked < self.start_step:
            self._look(self.start_step)
        ended = self.budget.spent or self._ends_early()
        with Progress(total, self.start_step) if self.engine.is_main else nullcontext() as progress:
            for step in range(self.start_step + 1, total + 1):
                if ended:
                    break
                self.engine.share = self.budget.share
                metrics = self._observe(step, self._step(step - 1))
                self.budget.spend(self.engine.gather_objects(metrics)[0])  # clocks differ
                self._write(step, metrics)
                self.done = step
                if self.recipe.checkpoint.grace_s:
                    self._keep(step)
                if progress:
                    progress.update(step, metrics, self.budget.expected_steps())
                self._look(step)
                asked = any(self.engine.gather_objects(stopping.asked))
                ended = step == total or self.budget.spent or self._ends_early()
                self.saver.check()
                if self._due(step, self.recipe.checkpoint.every) or ended or asked:
                    self._save(step)
                if asked and not ended:
                    return False
        return True

    def _look(self, step: int) -> None:
        """Evaluate or draw a grid where one is due after this step."""
        if self._due(step, self.recipe.eval.every) or step == self.recipe.run.steps or self.budget.spent:
            self._evaluate(step)
        elif self._due(step, self.recipe.run.sample_every):
            self._draw_samples(step)
        self.looked = step

    @contextmanager
    def _reporting(self, resume_step: int | None) -> Iterator[None]:
        """Keep the log and the trackers of the main process open, after `resume_step` of a run that goes on."""
        if not self.engine.is_main:
            yield
            return
        names = self.recipe.run.report_to, self.recipe.run.project
        settings = self.recipe.model_dump(mode="json")
        with MetricsLog(self.folder.path, resume_step, self.looked >= self.start_step) as self.log:
            self.trackers = Trackers.begin(*names, self.folder.path, settings, resume_step)
            try:
                yield
            except KeyboardInterrupt:  # stop at once: wait for no thread and no upload
                self.trackers = Trackers()
                raise
            finally:
                self.trackers.finish()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics down, and tell them to the trackers."""
        if self.log is not None:
            self.log.log(step, metrics)
            self.trackers.numbers(step, metrics)

    def _show(self, step: int, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Save a grid of samples, and show it in the trackers."""
        self.trackers.pictures(step, self.folder.save_grid(step, images, captions), images, captions)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _keep(self, step: int) -> None:
        """Copy the state to host memory, so that it can be saved whatever becomes of the next step. Collective."""
        same = self.kept is not None and self.kept.step == step
        tensors = self.kept.tensors if self.kept and same else self._tensors()
        self.kept = Snapshot(step, tensors, copy.deepcopy(self._state()))

    def _save(self, step: int, place: Path | None = None, keep: int | None = None) -> None:
        """Save a checkpoint among those of the run folder, or in `place`. Collective."""
        self._keep(step)
        if self.engine.is_main and self.kept:
            self.saver.save(place or self.folder.checkpoints, self.kept, keep or self.recipe.checkpoint.keep)

    def _rescue(self) -> None:
        """Begin to save the last finished step, where that was not done yet."""
        place, kept = self.folder.checkpoints, self.kept
        if self.engine.is_main and kept and not self.saver.has(place, kept.step):
            self.saver.add(place, kept, self.recipe.checkpoint.keep)

    def _rescued(self) -> bool:
        """Wait for the save and tell whether the last finished step is saved."""
        with contextlib.suppress(ImageRLError):  # what went wrong before is told
            self.saver.wait()
        return self.kept is not None and self.saver.has(self.folder.checkpoints, self.kept.step)

    def _leave(self) -> None:
        self._rescued()
        self.note(self._where_stopped())

    def _where_stopped(self) -> str:
        where = f"after step {self.done}" if self.done else "before the first step was done"
        return f"stopped {where}; continue with --resume"

    def _tensors(self) -> StateDict:
        """Gather the tensors of a checkpoint, whole, on the main process. Collective."""
        return self.engine.state_dict(moments=not self.recipe.checkpoint.weights_only)

    def _state(self) -> dict[str, object]:
        """Return the rest of a checkpoint beside tensors. All processes call it; the main one's result counts."""
        return {
            "first_eval": self.first,
            "last_eval": self.last,
            "looked": self.looked,
            "recipe": self.recipe.model_dump(mode="json"),
            "budget": self.budget.state(),
            "processes": self.engine.world_size,
        }

    def _observe(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics of a step with what the run makes of them."""
        return metrics

    def _ends_early(self) -> bool:
        """Tell whether the step just done is to be the last. Collective."""
        return False

    def _evaluate(self, step: int) -> None:
        """Evaluate on held-out samples; sets `first` (once) and `last` on the main process."""
        raise NotImplementedError

    def _draw_samples(self, step: int) -> None:
        """Draw a grid of the fixed prompts."""
        raise NotImplementedError

    def _finish(self, comparison: Comparison | None) -> None:
        """Finish the run; `comparison` is None when it was stopped early."""
        raise NotImplementedError


class Run(Loop):
    """A run of reinforcement learning."""

    recipe: Recipe

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        trainer: Trainer,
        heldout: Sequence[Prompt],
        eval_rollout: RolloutEngine,
        checkpoint: Checkpoint | None,
    ) -> None:
        super().__init__(recipe, folder, trainer, checkpoint, Budget.of(recipe))
        self.trainer = trainer
        self.heldout = heldout[: recipe.eval.size]
        self.eval_rollout = eval_rollout
        gold = [spec.label for spec in recipe.gold]
        state = checkpoint.state if checkpoint else {}
        self.before: AtTemperatures = {float(t): rows for t, rows in state.get("temperatures", {}).items()}
        self.after: AtTemperatures = {}
        self.page = LivePage(folder.path, self.note)
        self.watch = Watch(recipe.monitors, watched(recipe.monitors, gold))
        self.watch.restore(state.get("watch", {}))

    @contextmanager
    def _ready_to_draw(self) -> Iterator[None]:
        """Draw inside with the weights that are judged. Collective."""
        with self.engine.averaged():
            with self.engine.gathered_parameters():
                self.trainer.policy.refresh_sampler()
            yield

    def _drawn(self, source: RolloutEngine, shown: int = 0) -> Evaluation:
        """Evaluate the held-out prompts on all processes; each of them learns the whole."""
        settings = self.recipe.eval
        return evaluate(
            settings.suite,
            self.heldout,
            self.trainer.rollouts.judged(source),
            self.trainer.rollouts.scorer,
            settings.batch_size,
            shown=shown,
            ranks=self.engine,
            beside=(lambda groups: {"kl": kl_to_reference(source, groups)}) if settings.kl else None,
        )

    def _evaluate(self, step: int) -> None:
        with self._ready_to_draw():
            self._measure(step)
            if step == 0:
                self.before = self._at_temperatures()
        if self.watch.best_step == step and step and self.recipe.monitors.stop:
            self._save(step, self.folder.path / PEAK, keep=1)

    def _at_temperatures(self) -> dict[float, Rows]:
        """Evaluate at the recipe's further temperatures too; returns the rows at each, none without any. Collective."""
        usual, further = self.eval_rollout, self.recipe.eval.temperatures
        found: dict[float, Rows] = {usual.sampling.temperature: self.last or []} if further else {}
        return found | {temperature: self._drawn(usual.at(temperature)).per_prompt for temperature in further}

    def _measure(self, step: int) -> None:
        settings, count = self.recipe.eval, self.recipe.run.sample_prompts
        if step == 0 and self.engine.is_main:
            scorer, success = self.trainer.rollouts.scorer, self.recipe.data.success
            try_rewards(settings.suite, self.heldout, self.eval_rollout, scorer, success)
        evaluation = self._drawn(self.eval_rollout, count)
        self.first, self.last = self.first or evaluation.per_prompt, evaluation.per_prompt
        watched_metrics, alarms = self.watch.after_evaluation(step, evaluation.per_prompt)
        if not self.engine.is_main:
            return
        self.folder.write_evaluation(evaluation, step, self.recipe.model.path, settings.seed)
        self._write(step, evaluation.flat() | watched_metrics)
        shown = "  ".join(f"{n} {v.mean:.3f}" for n, v in evaluation.metrics.items())
        self.note(f"held-out after step {step}: {shown}")
        self._sound(step, alarms)
        self._show(step, *with_sources(evaluation.images, self.heldout[:count]))

    def _look(self, step: int) -> None:
        super()._look(step)
        if self.engine.is_main and (step == 1 or self._due(step, self.recipe.run.report_every)):
            self.page.write()

    def _draw_samples(self, step: int) -> None:
        """Draw a grid of the first held-out prompts, with the random numbers of the evaluation."""
        prompts = self.heldout[: self.recipe.run.sample_prompts]
        with self._ready_to_draw():
            if self.engine.is_main:
                parts = self.eval_rollout.generate(prompts, 1, f"eval {self.recipe.eval.suite}")
                drawn = {group.prompt.index: group for part in parts for group in part}
        if self.engine.is_main:
            thoughts = self.eval_rollout.thoughts_of(groups := [drawn[prompt.index] for prompt in prompts])
            self._show(step, *with_sources([group.images[0] for group in groups], prompts, thoughts))

    def _tensors(self) -> StateDict:
        own = self.trainer.tensors() if self.engine.is_main else {}
        return super()._tensors() | {group: on_host(named) for group, named in own.items()}

    def _state(self) -> dict[str, object]:
        own = {"trainer": self.trainer.state(), "watch": self.watch.state()}
        return super()._state() | own | {"temperatures": {str(t): rows for t, rows in self.before.items()}}

    def _observe(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        found, alarms = self.watch.after_step(step, metrics)
        self._sound(step, alarms)
        return {**metrics, **found}

    def _sound(self, step: int, alarms: Sequence[str]) -> None:
        for alarm in alarms:
            self.trackers.alarm(step, alarm)
            self.note(f"ALARM {alarm}")

    def _ends_early(self) -> bool:
        return bool(self.engine.gather_objects(self.watch.halts)[0])

    def _where_best(self) -> str:
        if not self.watch.best_step:
            return "the watched metrics were best before training"
        place = self.folder.path / PEAK / f"step_{self.watch.best_step:06d}"
        return f"the watched metrics were best at step {self.watch.best_step}, kept in {place}"

    def _finish(self, comparison: Comparison | None) -> None:
        if self.finished and self.recipe.eval.temperatures:
            with self._ready_to_draw():
                self.after = self._at_temperatures()
        if not self.engine.is_main:
            return
        if comparison is not None:
            best = compare_at_best(self.before, self.after)
            self.folder.write_comparison(comparison, self.recipe.eval.suite, self.done, best)
            self.trackers.table(self.done, *results_table(comparison))
            if told := told_at_best(best):
                self.note(told)
            if self.watch.halts and self.done < self.recipe.run.steps:
                flat = f"patience: the held-out total was {self.watch.waited} evaluations no higher"
                told = flat if self.watch.plateaued else f"stop; {self._where_best()}"
                self.note(f"ended after step {self.done} by monitors.{told}")
        self.note(f"report: {write_report(self.folder.path)}")
