"""The runs of a comparison: every recipe with every seed, at one budget, and only if their results can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imagerl.rl.config.train import Recipe, load_recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import to_json
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import read_json
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.rollout.preparing import evaluation_sampling
from imagerl.rl.run.folder import RECIPE_FILE, differing_keys

PLAN_FILE = "comparison.json"
OURS = ("run.steps", "run.seed", "run.output_dir", "run.images", "run.minutes")  # follow from the budget
MOST = 1e9  # of a budget
ENDLESS = 1_000_000  # steps of a run that the clock ends
UNITS = ("images", "minutes")


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """The budget of each run: pictures drawn in training, or minutes of it."""

    unit: Literal["images", "minutes"]
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run: `imagerl train <path> <overrides>` into `folder`."""

    label: str
    seed: int
    path: str
    overrides: tuple[str, ...]
    folder: Path
    recipe: Recipe = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "eval" / "comparison.json").exists()

    def refuse_other(self) -> None:
        """Raise ImageRLError when the folder holds another recipe's run."""
        stored = self.folder / RECIPE_FILE
        changed = stored.exists() and differing_keys(load_recipe(stored), self.recipe)
        if changed:
            raise ImageRLError(
                f"{self.folder} was run with another {changed[0]}; set another --output, or remove that folder"
            )


@dataclass(slots=True)
class Plan:
    """The plan of a comparison, kept in its folder as comparison.json."""

    budget: BudgetSpec
    seeds: list[int]
    recipes: dict[str, str]  # label -> file
    baseline: str
    overrides: list[str]
    evals: int | None = None

    @property
    def command(self) -> list[str]:
        """Return the one call that makes all of it, whatever calls it was made by. Its folder is left out."""
        return [
            *("imagerl", "compare", *self.recipes.values()),
            *(
                "--seeds",
                f"{max(self.seeds) + 1}",
                "--budget",
                f"{self.budget.unit}={self.budget.amount:.15g}",
            ),
            *(("--evals", f"{self.evals}") if self.evals else ()),
            *("--baseline", self.baseline, *self.overrides),
        ]

    def joined_to(self, folder: Path, resume: bool, keep_baseline: bool) -> Plan:
        """Return this plan together with that which the folder already holds: more recipes and more seeds.

        Raises ImageRLError when there is one and `resume` is false, or it asks for something else."""
        if not (folder / PLAN_FILE).exists():
            return self._checked()
        if not resume:
            raise ImageRLError(f"{folder} already holds a comparison; add --resume, or set another --output")
        stored = Plan.read(folder)
        for name in ("budget", "evals", "overrides"):
            theirs, ours = getattr(stored, name), getattr(self, name)
            if theirs != ours:
                raise ImageRLError(
                    f"{folder} was begun with another {name} ({_shown(theirs)}, not {_shown(ours)}); "
                    "give the same, or set another --output"
                )
        for label, path in self.recipes.items():
            if stored.recipes.get(label, path) != path:
                raise ImageRLError(
                    f"{folder} already compares another {label}, {stored.recipes[label]}; rename one"
                )
        return Plan(
            self.budget,
            sorted({*stored.seeds, *self.seeds}),
            stored.recipes | self.recipes,
            stored.baseline if keep_baseline else self.baseline,
            self.overrides,
            self.evals,
        )._checked()

    def _checked(self) -> Plan:
        if self.baseline not in self.recipes:
            raise ImageRLError(f'--baseline "{self.baseline}" is none of {", ".join(self.recipes)}')
        return self

    def write(self, folder: Path) -> None:
        write_atomic(folder / PLAN_FILE, to_json(self, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read a folder's plan. Raises ImageRLError when it holds no comparison."""
        path = folder / PLAN_FILE
        if not path.exists():
            raise ImageRLError(f"{folder} holds no comparison: there is no {PLAN_FILE}")
        try:
            return validated(cls, read_json(path), "it")
        except ImageRLError as error:
            raise ImageRLError(f"{path} is damaged ({error}); remove it to plan anew") from None


def parse_budget(text: str) -> BudgetSpec:
    """Parse `images=3000` or `minutes=5`. Raises ImageRLError for anything else."""
    found = re.fullmatch(r"(images|minutes)=([0-9]+(?:\.[0-9]+)?)", text)
    amount = float(found[2]) if found else 0.0
    if not found or not 0 < amount <= MOST or (found[1] == "images" and amount != int(amount)):
        raise ImageRLError(f'--budget "{text}" should be images=N or minutes=M, as in images=3000')
    return BudgetSpec("images" if found[1] == "images" else "minutes", amount)


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return recipes and `key=value` overrides, which may stand in any order."""
    overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
    recipes = [word for word in words if word not in overrides]
    for override in overrides:
        key = override.partition("=")[0]
        if key in OURS:
            raise ImageRLError(f"{key} follows from --budget, --seeds and --output; leave it out")
        if "env_vars" in override:
            raise ImageRLError(
                "env_vars may hold secrets and overrides are written down; put it into the recipes"
            )
    return recipes, overrides


def label_recipes(paths: Sequence[str]) -> dict[str, str]:
    """Return each recipe under the name of its file. Raises ImageRLError when two have the same."""
    labels: dict[str, str] = {}
    for path in paths:
        label = Path(path).stem
        if label in labels:
            raise ImageRLError(f'two recipes are called "{label}": {labels[label]} and {path}; rename one')
        labels[label] = path
    return labels


def plan_runs(plan: Plan, folder: Path) -> list[PlannedRun]:
    """Plan all runs, first all recipes with the first seed, so that an unfinished comparison is one of fewer seeds.

    Raises ImageRLError for a mistake in a recipe, a budget below one step, or recipes that cannot be compared."""
    runs = []
    for seed in plan.seeds:
        for label, path in plan.recipes.items():
            place = folder / label / f"seed-{seed}"
            fixed = (f"run.seed={seed}", f"run.output_dir={place}")
            spent = spending(load_recipe(path, [*plan.overrides, *fixed]), plan.budget, plan.evals, label)
            overrides = (*plan.overrides, *fixed, *spent)
            runs.append(PlannedRun(label, seed, path, overrides, place, load_recipe(path, overrides)))
    refuse_incomparable({run.label: run.recipe for run in runs})
    return runs


def spending(recipe: Recipe, budget: BudgetSpec, evals: int | None, label: str) -> list[str]:
    """Return overrides that make a recipe spend the budget. Where a step always draws the same number of pictures the
    budget is a number of steps, and the run an ordinary one; else it is counted while running."""
    if budget.unit == "minutes":
        return [f"run.steps={ENDLESS}", f"run.minutes={float(budget.amount)}"]
    rollout = recipe.rollout
    per_step = rollout.prompts_per_step * rollout.group_size * rollout.decodes
    steps = int(budget.amount) // per_step
    if not steps:
        raise ImageRLError(
            f"--budget images={budget.amount:g} is less than one step of {label}, {per_step} images"
        )
    overrides = [f"run.steps={steps}"]
    if recipe.algorithm.max_resamples:
        overrides.append(f"run.images={int(budget.amount)}")
    if evals:
        overrides.append(f"eval.every={max(1, round(steps / evals))}")
    return overrides


def refuse_incomparable(recipes: Mapping[str, Recipe]) -> None:
    """Raise ImageRLError, naming the key, when two recipes would be judged differently or begin differently."""
    (first, standard), *others = ((label, measured(recipe)) for label, recipe in recipes.items())
    for label, theirs in others:
        for key in dict.fromkeys([*standard, *theirs]):
            if standard.get(key) != theirs.get(key):
                raise ImageRLError(
                    f"{first} and {label} cannot be compared: {key} is {_shown(standard.get(key))} in one and "
                    f"{_shown(theirs.get(key))} in the other; set it alike"
                )


def measured(recipe: Recipe) -> dict[str, object]:
    """Return what decides where a run begins and how it is judged, by the key that sets it."""
    sampling = evaluation_sampling(recipe)
    rewards = [*recipe.rewards.functions, *recipe.gold]
    return {
        "model.path": recipe.model.path,
        "model.dtype": recipe.model.dtype,
        "engine.precision": recipe.engine.precision,
        **{f"data.heldout.{key}": value for key, value in recipe.data.heldout.model_dump().items()},
        "eval.suite": recipe.eval.suite,
        "eval.size": recipe.eval.size,
        "eval.seed": recipe.eval.seed,
        "eval.guidance": sampling.guidance,
        "eval.flow_steps": sampling.flow_steps,
        "rollout.temperature": sampling.temperature,
        # weights and gates may differ: evaluations report each reward's own values
        **{
            f"the reward or gold metric {spec.label}": {"import_path": spec.import_path, **spec.kwargs}
            for spec in rewards
        },
    }


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)
