"""The folder of a run: what it holds, whose it is, and whether it may be begun or continued."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from imagerl.rl.config.engine import CheckpointConfig, EngineConfig
from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe, validate_recipe
from imagerl.rl.config.rewards import without_addresses
from imagerl.rl.config.sft import AnyRecipe
from imagerl.rl.engine.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_sound,
    step_of,
)
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.evaluate import Evaluation
from imagerl.rl.evaluation.stats import Comparison
from imagerl.rl.files.environment import ENVIRONMENT_FILE, recorded_files, write_environment
from imagerl.rl.files.grids import image_grid, save_image
from imagerl.rl.files.metrics import METRICS_FILE, to_json
from imagerl.rl.files.writing import clean_leftovers, lock_file, process_place, write_atomic, write_error

RECIPE_FILE = "recipe.yaml"
TRACKERS_FILE = "trackers.json"  # by which a resumed run finds its lines
LOCK = ".lock"
MODEL = "model"  # what supervised training leaves
EXPORTS = "exports"  # models made of its checkpoints, for those who begin from them
PEAK = "peak"  # the checkpoint at which the watched metrics were best, with monitors.stop
# What may change between a run and its continuation without making it another experiment.
CHANGEABLE = {
    *("run.steps", "run.images", "run.minutes", "run.output_dir"),
    *("run.report_to", "run.project", "run.report_every"),
    *(f"checkpoint.{key}" for key in CheckpointConfig.model_fields),
    *("rollout.max_logprob_diff", "algorithm.flow.max_logprob_diff"),
    *(f"rewards.{key}" for key in ("workers", "timeout_s", "max_failure_rate", "max_restarts")),
    *("data.workers", "data.max_bad_share", "run.model_dtype"),
    # how the same numbers are computed
    *(f"engine.{key}" for key in EngineConfig.model_fields if key != "precision"),
    *(f"rollout.{key}" for key in ("sample_chunk", "decode_chunk", "workers", "num_gpus")),
    "eval.batch_size",
    *(f"monitors.{key}" for key in MonitorsConfig.model_fields),
}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []  # folders that were not there before

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def begun(self) -> bool:
        """Tell whether it holds a run, or what is left of one."""
        names = (RECIPE_FILE, METRICS_FILE, CHECKPOINTS, ENVIRONMENT_FILE)
        return any((self.path / name).exists() for name in names)

    def lock(self) -> None:
        """Make the folder and keep it for this process until `release`, or its end. What killed runs left half
        written in it goes.

        Raises ImageRLError when another process has it, or when it cannot be written to."""
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        path = self.path / LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(path)
            if self._lock is None:
                raise ImageRLError(
                    f"{self.path} is in use by {path.read_text(errors='replace').strip() or 'another process'}; "
                    "wait until that run has ended, or set another run.output_dir"
                )
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {process_place()}".encode())
            for folder in (self.path, *(entry for entry in self.path.iterdir() if entry.is_dir())):
                clean_leftovers(folder)
        except OSError as error:
            raise write_error(self.path, error) from error

    def release(self) -> None:
        """Let others have the folder; one that was made by `lock` and is still empty goes. May be called twice."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()
        self._lock, self._made = None, []

    def refuse_loss(self, recipe: RecipeModel, overwrite: bool) -> None:
        """Raise ImageRLError when a new run would write over anything, other than, with `overwrite`, the files of
        a run by its own record; and when the folder is one that people and models live in."""
        self.refuse_shared(recipe)
        own, written = self._recorded(), self._found(contents(recipe))
        others = sorted(written - own)
        if self.begun and not overwrite:
            raise ImageRLError(
                f"{self.path} already holds a run; add --resume to continue it, --overwrite to replace it "
                "(in Python resume=True, overwrite=True), or set another run.output_dir"
            )
        if overwrite and not own:
            others = others or sorted(path for path in self.path.iterdir() if path.name != LOCK)
        if others:
            raise ImageRLError(
                f"{self.path} holds {others[0].relative_to(self.path)}, which is not known to be of a run "
                f"({ENVIRONMENT_FILE} of a run lists its files); move it away or set another run.output_dir"
            )

    def refuse_shared(self, recipe: RecipeModel) -> None:
        """Raise ImageRLError when people or the model in use live in the folder."""
        folder = self.path.resolve()
        model = getattr(getattr(recipe, "model", None), "path", None)
        for place, what in (
            (Path.cwd(), "the working directory"),
            (Path("~").expanduser(), "your home directory"),
            (Path(str(model)).expanduser(), "the model that it begins from"),
        ):
            if place.is_dir() and place.resolve().is_relative_to(folder):
                raise ImageRLError(
                    f"run.output_dir {self.path} holds {what}; a run needs a folder of its own, as in runs/mine"
                )

    def _recorded(self) -> set[Path]:
        """Find the files of the run that made the folder, by its own record."""
        patterns = [PurePath(name) for name in recorded_files(self.path)]
        return self._found(str(p) for p in patterns if not p.is_absolute() and ".." not in p.parts)

    def _found(self, patterns: Iterable[str]) -> set[Path]:
        return {path for pattern in patterns for path in self.path.glob(pattern)}

    def resumable(self, recipe: AnyRecipe, step: int | None = None) -> Checkpoint | None:
        """Return the newest sound checkpoint, or that of a `step`; None when the run was stopped before its first.
        Damaged ones are told of.

        Raises ImageRLError when there is no run, or it is one of another recipe, or longer."""
        if not self.begun:
            raise ImageRLError(f"there is no run in {self.path} to continue; leave --resume out to begin one")
        stored = self.path / RECIPE_FILE
        if stored.exists():
            self._refuse_other(load_yaml_recipe(type(recipe), stored), recipe, "was")
        checkpoint = newest_sound(self.checkpoints) if step is None else self._checkpoint_of(step)
        if checkpoint is None:
            return None
        source = str(checkpoint.folder)
        made_by = validate_recipe(type(recipe), checkpoint.state.get("recipe", {}), source)
        self._refuse_other(made_by, recipe, f"has a checkpoint, {checkpoint.folder.name}, that was")
        if made_by.checkpoint.weights_only:
            raise ImageRLError(
                f"{checkpoint.folder} holds weights only (checkpoint.weights_only), no run can go on from it; "
                "begin one from its export, as model.path"
            )
        if checkpoint.step > recipe.run.steps:
            raise ImageRLError(
                f"{self.path} is at step {checkpoint.step} already but run.steps is {recipe.run.steps}; "
                "raise run.steps or set another run.output_dir"
            )
        return checkpoint

    def _checkpoint_of(self, step: int) -> Checkpoint:
        kept = {step_of(folder): folder for folder in list_checkpoints(self.checkpoints)}
        if step not in kept:
            there = f"there is {', '.join(map(str, kept))}" if kept else "there is none"
            raise ImageRLError(
                f"{self.path} has no checkpoint of step {step}; {there} (checkpoint.keep says how many stay)"
            )
        return load_checkpoint(kept[step])

    def _refuse_other(self, stored: AnyRecipe, given: AnyRecipe, which: str) -> None:
        if changed := differing_keys(stored, given):
            raise ImageRLError(
                f"{self.path} {which} started with another {changed[0]}; resume with the same recipe, "
                "or set another run.output_dir"
            )

    def begin(self, recipe: AnyRecipe, command: Sequence[str], overwrite: bool = False) -> None:
        """Write the record of the run and its recipe; with `overwrite` in place of the run that was there. Other
        files in the folder stay."""
        if overwrite:
            try:
                self._remove_run()
            except OSError as error:
                raise write_error(self.path, error) from error
        write_environment(self.path, command, contents(recipe))
        write_atomic(self.path / RECIPE_FILE, recipe.to_yaml())

    def _remove_run(self) -> None:
        record = self.path / ENVIRONMENT_FILE
        files = self._recorded()
        for path in sorted(files - {record}):
            path.unlink()
        owned = self.checkpoints, self.path / PEAK, self.path / EXPORTS
        for folder in sorted({p.parent for p in files} | {*owned}, reverse=True):
            with contextlib.suppress(OSError):  # others' files are in it
                if folder != self.path:
                    folder.rmdir()
        record.unlink(missing_ok=True)  # last: what a kill leaves is still known to be a run's

    def write_evaluation(self, evaluation: Evaluation, step: int, model: str, seed: int) -> None:
        text = to_json(evaluation.to_dict(step=step, model=model, seed=seed), indent=1)
        write_atomic(self.path / "eval" / f"{evaluation.suite}_step_{step:06d}.json", text + "\n")

    def write_comparison(
        self,
        comparison: Comparison,
        suite: str,
        after_step: int,
        best: Mapping[str, object] | None = None,
    ) -> None:
        document = {
            "suite": suite,
            "before_step": 0,
            "after_step": after_step,
            "metrics": comparison,
            **({"best_temperature": best} if best else {}),
        }
        write_atomic(self.path / "eval" / "comparison.json", to_json(document, indent=1) + "\n")

    def save_grid(self, step: int, images: Sequence[np.ndarray], captions: Sequence[str]) -> Path:
        scale = max(1, 192 // images[0].shape[1])
        grid = image_grid(images, columns=4, captions=captions, scale=scale)
        return save_image(grid, self.path / "samples" / f"step_{step:06d}.png")


def contents(recipe: RecipeModel) -> tuple[str, ...]:
    """List the files that a run of this recipe writes into its folder, as patterns of names."""
    suite = getattr(getattr(recipe, "eval", None), "suite", "heldout")
    step = "step_[0-9]*"
    saved = [
        f"{place}/{step}/{name}" for place in (CHECKPOINTS, PEAK) for name in ("*.safetensors", "*.json")
    ]
    model = [f"{MODEL}/*.{ending}" for ending in ("safetensors", "json", "txt", "jinja")]
    return (
        *(
            RECIPE_FILE,
            ENVIRONMENT_FILE,
            METRICS_FILE,
            "report.html",
            TRACKERS_FILE,
            "tb/events.out.tfevents.*",
        ),
        *(
            f"samples/{step}.png",
            f"eval/{suite}_{step}.json",
            "eval/comparison.json",
            f"exports/{step}/*",
            *saved,
        ),
        *(model if getattr(recipe, "kind", "train") == "sft" else ()),
    )


def differing_keys(stored: RecipeModel, given: RecipeModel) -> list[str]:
    """List the dotted keys in which two recipes differ, those that may change left out."""
    return [key for key in differences(stored, given) if key not in CHANGEABLE]


def differences(stored: RecipeModel, given: RecipeModel) -> dict[str, tuple[object, object]]:
    """Return the values, before and now, of the dotted keys in which two recipes differ."""

    def flat(
        values: Mapping[str, Any], prefix: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], object]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, (*prefix, key))
            else:
                yield (*prefix, key), value

    old, new = (dict(flat(without_addresses(recipe.model_dump(mode="json")))) for recipe in (stored, given))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return {".".join(key): (old.get(key), new.get(key)) for key in keys}


def told_changes(checkpoint: Checkpoint, recipe: AnyRecipe, processes: int) -> str:
    """Return, in one line, what is other than when the checkpoint was written; empty when nothing is."""
    before = validate_recipe(type(recipe), checkpoint.state.get("recipe", {}), str(checkpoint.folder))
    changes = differences(before, recipe)
    if (were := checkpoint.state.get("processes", processes)) != processes:
        changes["the number of processes"] = (were, processes)
    told = ", ".join(
        f"{key} {json.dumps(now)} (was {json.dumps(old)})" for key, (old, now) in changes.items()
    )
    return f"going on from step {checkpoint.step} with {told}" if told else ""
