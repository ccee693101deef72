"""The folder of a run: what it holds, and whether it may be begun or continued."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl.checkpoint import CHECKPOINTS, latest_checkpoint, step_of
from rl.errors import ImageRLError
from rl.evaluation.evaluate import Evaluation
from rl.files import is_temporary, write_atomic
from rl.metrics import METRICS_FILE, image_grid, save_image, to_json
from rl.monitoring.config import MonitorsConfig
from rl.recipe import RecipeModel, load_yaml_recipe
from rl.reward_config import without_addresses
from rl.sft.config import AnyRecipe

RECIPE_FILE = "recipe.yaml"
MODEL = "model"  # what supervised training leaves
PEAK = "peak"  # the checkpoint at which the watched metrics were best, with monitors.stop
CONTENTS = {
    RECIPE_FILE,
    METRICS_FILE,
    CHECKPOINTS,
    MODEL,
    PEAK,
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
    *(f"monitors.{key}" for key in MonitorsConfig.model_fields),
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


def read_stored_recipe(path: Path, schema: type[AnyRecipe]) -> AnyRecipe:
    return load_yaml_recipe(schema, path)


def differing_keys(stored: RecipeModel, given: RecipeModel) -> list[str]:
    """Dotted keys in which two recipes differ, those that may change left out."""

    def flat(
        values: Mapping[str, Any], prefix: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, (*prefix, key))
            else:
                yield (*prefix, key), value

    old, new = (dict(flat(without_addresses(recipe.model_dump()))) for recipe in (stored, given))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [key for key in map(".".join, keys) if key not in CHANGEABLE]
