"""A training run put together: models, rewards and the trainer meet here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.api.recipes import Overrides, Rewards
    from imagerl.api.runs import TrainingResult
    from imagerl.models.base import PromptReader
    from imagerl.rl.config.sft import AnyRecipe
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.data.prompt_sets import PromptSet


def closing_line(comparison: Mapping[str, Any]) -> str:
    """Tell what the run is judged by, before → after; see `rl.evaluation.stats.headline`."""
    from imagerl.rl.evaluation.stats import HEADLINES, change, headline, number

    metric = headline(comparison)
    if metric is None:
        return "held-out: no sample could be scored both before and after"
    result, rate = comparison[metric], metric in HEADLINES
    before, after = (number(result[when], rate) for when in ("before", "after"))
    return f"held-out {metric.replace('_', ' ')}: {before} → {after} ({change(result['difference'], rate)})"


def read_prompts(recipe: Recipe) -> tuple[PromptSet, PromptSet, PromptReader]:
    """Read the prompts to train on, the held-out ones, and what reads them. No weights are read.

    Raises ImageRLError when they overlap, or for one that the model cannot read."""
    from imagerl.models.families import load_prompts
    from imagerl.rewards.ocr.reward import wanted_text
    from imagerl.rl.data.prompt_sets import load_prompt_set, refuse_overlap
    from imagerl.rl.rollout.engine import refuse_impossible, training_sampling

    prompts, heldout = load_prompt_set(recipe.data.train), load_prompt_set(recipe.data.heldout)
    refuse_overlap(prompts, heldout, wanted_text)
    reader = load_prompts(recipe.model.path, recipe.model.family)
    every, algorithm = (*prompts, *heldout), recipe.algorithm
    reader.require(every)
    refuse_impossible(
        reader, every, training_sampling(recipe), algorithm.flow is not None, algorithm.region_credit > 0
    )
    return prompts, heldout, reader


def train(
    recipe: AnyRecipe | str | Path,
    overrides: Overrides = (),
    /,
    *,
    rewards: Rewards | None = None,
    resume: bool | int = False,
    overwrite: bool = False,
    command: Sequence[str] | None = None,
) -> TrainingResult:
    """Train as a recipe says, by reinforcement or, where its kind is sft, by supervision.

    Recipe and overrides are those of `load_recipe`; `rewards`, in place of the recipe's, may be functions: see
    `reward_entries`. They may be called in other processes unless `rewards.workers` is 0. `command` is what the run's
    record gives as the way to repeat it. What the process had set, of torch, Accelerate, signals, environment and
    random numbers, is as before when this returns.

    Raises ImageRLError for whatever the caller can mend."""
    from imagerl.api.recipes import load_recipe
    from imagerl.api.running import settings_kept
    from imagerl.api.runs import TrainingResult
    from imagerl.rl.config.train import Recipe

    sections = {} if rewards is None else {"rewards.functions": rewards}
    settings = load_recipe(recipe, overrides, **sections)
    if resume is not False and overwrite:
        raise ImageRLError("resume continues a run and overwrite deletes it; ask for only one")
    with settings_kept():
        if isinstance(settings, Recipe):
            comparison = run_training(settings, resume, overwrite, command)
            told = None if comparison is None else closing_line(comparison)
        else:
            from imagerl.api.fine_tuning import closing_line as closing_losses
            from imagerl.api.fine_tuning import run_sft

            comparison = run_sft(settings, resume, overwrite, command)
            told = closing_losses(comparison) if comparison else None
    if told is not None:
        print(told)
    return TrainingResult(settings.run.output_dir)


def run_training(
    recipe: Recipe, resume: bool | int = False, overwrite: bool = False, command: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Put a run together and execute it; returns the held-out comparison, None when it was stopped early and on
    all but the main process. `resume` is True to go on from the newest checkpoint, or the step
    of another. The run folder is locked first; it is written to only once everything else is found in
    order."""
    import torch

    from imagerl.api.exporting import with_model
    from imagerl.api.running import begin_run, open_run
    from imagerl.models.families import load_policy
    from imagerl.rewards.base import check_entries
    from imagerl.rewards.workers.pool import RewardWorkers
    from imagerl.rl.config.rewards import refuse_hidden
    from imagerl.rl.data.curriculum import CurriculumSampler
    from imagerl.rl.data.seeding import GroupedSampler
    from imagerl.rl.engine.engine import Engine
    from imagerl.rl.rollout.engine import RolloutEngine, evaluation_sampling, training_sampling
    from imagerl.rl.run.folder import RunFolder
    from imagerl.rl.run.loop import Run
    from imagerl.rl.training.halves import freeze_references, lr_factor, trained_module
    from imagerl.rl.training.trainer import Trainer

    recipe = with_model(recipe, resume is not False)
    refuse_hidden([*recipe.rewards.functions, *recipe.gold])
    prompts, heldout, reader = read_prompts(recipe)
    chosen = prompts, recipe.rollout.prompts_per_step, recipe.run.seed, reader.canvas
    curriculum = recipe.data.curriculum
    sampler = CurriculumSampler(*chosen, curriculum) if curriculum else GroupedSampler(*chosen)
    folder = RunFolder(recipe.run.output_dir)
    engine = Engine(recipe.engine)
    scorer = None
    try:
        if recipe.rollout.prompts_per_step < engine.world_size:
            raise ImageRLError(
                f"{engine.world_size} processes have nothing to do with {recipe.rollout.prompts_per_step} prompts a "
                "step; raise rollout.prompts_per_step or start fewer processes"
            )
        checkpoint = open_run(engine, folder, recipe, resume, overwrite)
        entries = [[spec.model_dump() for spec in specs] for specs in (recipe.rewards.functions, recipe.gold)]
        check_entries([*entries[0], *entries[1]], prompts.columns)  # before time goes into loading
        storage = torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32
        policy = load_policy(recipe.model.path, engine.device, storage, recipe.model.family)
        if recipe.engine.precision == "bf16":
            policy.sampler_dtype = torch.bfloat16
        module = trained_module(policy, recipe)
        freeze_references(policy, recipe)
        scorer = RewardWorkers(
            entries[0],
            gold=entries[1],
            workers=recipe.rewards.workers,
            timeout_s=recipe.rewards.timeout_s,
            max_restarts=recipe.rewards.max_restarts,
            columns=prompts.columns,
            policy=policy,
        )
        engine.prepare(
            module,
            recipe.optim,
            recipe.run.steps * recipe.algorithm.updates_per_rollout,
            checkpoint.tensors if checkpoint else None,
            partial(lr_factor, recipe),
        )
        rollout = RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, engine.autocast)
        eval_rollout = RolloutEngine(policy, evaluation_sampling(recipe), recipe.eval.seed, engine.autocast)
        trainer = Trainer(recipe, policy, scorer, sampler, rollout, engine)
        if checkpoint:
            trainer.restore(checkpoint.state.get("trainer", {}), checkpoint.tensors)
        scorer.wait_until_ready()
        begin_run(engine, folder, recipe, overwrite, command)
        for doubt in recipe.doubts if engine.is_main else ():
            print(f"imagerl: {doubt}", file=sys.stderr)
        return Run(recipe, folder, trainer, heldout.prompts, eval_rollout, checkpoint).execute(
            resume is not False
        )
    finally:
        if scorer is not None:
            scorer.close()
        folder.release()
        engine.close()
