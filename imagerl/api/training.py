"""A training run put together: models, rewards and the trainer meet here."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagerl.api.recipes import Overrides, Rewards
    from imagerl.api.runs import TrainingResult
    from imagerl.models.base import Policy, PromptReader
    from imagerl.rl.config.sft import AnyRecipe
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.data.prompt_sets import PromptSet
    from imagerl.rl.evaluation.stats import Comparison
    from imagerl.rl.rollout.engine import RolloutEngine


def closing_line(comparison: Comparison, gold: Collection[str] = ()) -> str:
    """Tell what the run is judged by, before → after: the `rl.evaluation.stats.headline` of what was rewarded, and that
    of the `gold` metrics beside it where it is the better known one."""
    from imagerl.rl.evaluation.stats import HEADLINES, change, headline, number

    metric = headline([name for name in comparison if name not in gold] or comparison)
    if metric is None:
        return "held-out: no sample could be scored both before and after"

    def told(name: str) -> str:
        result, rate = comparison[name], name in HEADLINES
        before, after = (number(result[when], rate) for when in ("before", "after"))
        return f"{name.replace('_', ' ')}: {before} → {after} ({change(result['difference'], rate)})"

    known = headline(comparison)
    beside = f"; never rewarded, {told(known)}" if known in HEADLINES and metric not in HEADLINES else ""
    return f"held-out {told(metric)}{beside}"


def read_prompts(recipe: Recipe) -> tuple[PromptSet, PromptSet, PromptReader]:
    """Read the prompts to train on, the held-out ones, and what reads them. No weights are read.

    Raises ImageRLError when they overlap, or for one that the model cannot read."""
    from imagerl.models.families import load_prompts
    from imagerl.rewards.ocr.reward import wanted_text
    from imagerl.rl.data.prompt_sets import load_prompt_set, refuse_overlap
    from imagerl.rl.rollout.engine import training_sampling
    from imagerl.rl.rollout.preparing import refuse_impossible

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
    from imagerl.rl.run.report import gold_metrics

    sections = {} if rewards is None else {"rewards.functions": rewards}
    settings = load_recipe(recipe, overrides, **sections)
    if resume is not False and overwrite:
        raise ImageRLError("resume continues a run and overwrite deletes it; ask for only one")
    with settings_kept():
        if isinstance(settings, Recipe):
            comparison = run_training(settings, resume, overwrite, command)
            gold = gold_metrics(settings.model_dump(), settings.eval.suite, comparison or ())
            told = None if comparison is None else closing_line(comparison, gold)
        else:
            from imagerl.api.fine_tuning import closing_line as closing_losses
            from imagerl.api.fine_tuning import run_sft

            comparison = run_sft(settings, resume, overwrite, command)
            told = closing_losses(comparison) if comparison else None
    if told is not None:
        print(told)
    return TrainingResult(settings.run.output_dir)


def load_generator(recipe: Recipe, device: torch.device) -> tuple[Policy, nn.Module]:
    """Load the model of a recipe with the adapters that it asks for; returns it and the module that trains."""
    import torch

    from imagerl.models.families import load_policy
    from imagerl.rl.training.halves import trained_module

    storage = torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32
    policy = load_policy(recipe.model.path, device, storage, recipe.model.family)
    if recipe.engine.precision == "bf16":
        policy.sampler_dtype = torch.bfloat16
    return policy, trained_module(policy, recipe)


def load_rollout(recipe: Recipe) -> tuple[RolloutEngine, nn.Module]:
    """Load what a rollout actor draws with, and the module whose weights it will be given."""
    import torch

    from imagerl.rl.engine.engine import ask_to_repeat
    from imagerl.rl.rollout.engine import RolloutEngine, training_sampling

    settings = recipe.engine
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    ask_to_repeat(device, settings.deterministic)
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    policy, module = load_generator(recipe, device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    return RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, autocast), module.to(device)


def run_training(
    recipe: Recipe, resume: bool | int = False, overwrite: bool = False, command: Sequence[str] | None = None
) -> Comparison | None:
    """Put a run together and execute it; returns the held-out comparison, None when it was stopped early and on
    all but the main process. `resume` is True to go on from the newest checkpoint, or the step
    of another. The run folder is locked first; it is written to only once everything else is found in
    order."""
    from imagerl.api.exporting import with_model
    from imagerl.api.running import begin_run, open_run
    from imagerl.models.common.checks import try_out
    from imagerl.rewards.base import check_entries
    from imagerl.rewards.workers.pool import RewardWorkers
    from imagerl.rewards.workers.shared import SharedRewards
    from imagerl.rl.config.rewards import refuse_hidden
    from imagerl.rl.data.curriculum import CurriculumSampler
    from imagerl.rl.data.seeding import GroupedSampler
    from imagerl.rl.engine.cluster import OBJECT_STORE_BYTES, start_ray, stop_ray
    from imagerl.rl.engine.engine import Engine
    from imagerl.rl.rollout.engine import (
        LocalRollouts,
        RolloutEngine,
        Rollouts,
        training_sampling,
        with_pictures,
    )
    from imagerl.rl.rollout.preparing import evaluation_sampling
    from imagerl.rl.rollout.ray_rollouts import RayRollouts
    from imagerl.rl.run.folder import RunFolder
    from imagerl.rl.run.loop import Run
    from imagerl.rl.training.halves import freeze_references, lr_factor
    from imagerl.rl.training.trainer import Trainer

    recipe = with_model(recipe, resume is not False)
    refuse_hidden([*recipe.rewards.functions, *recipe.gold])
    prompts, heldout, reader = read_prompts(recipe)
    chosen = prompts, recipe.rollout.prompts_per_step, recipe.run.seed, reader.canvas
    curriculum = recipe.data.curriculum
    sampler = CurriculumSampler(*chosen, curriculum) if curriculum else GroupedSampler(*chosen)
    folder = RunFolder(recipe.run.output_dir)
    engine = Engine(recipe.engine)
    owns_ray = False
    scorer: RewardWorkers | SharedRewards | None = None
    rollouts: Rollouts | None = None
    try:
        if recipe.rollout.prompts_per_step < engine.world_size:
            raise ImageRLError(
                f"{engine.world_size} processes have nothing to do with {recipe.rollout.prompts_per_step} prompts a "
                "step; raise rollout.prompts_per_step or start fewer processes"
            )
        checkpoint = open_run(engine, folder, recipe, resume, overwrite)
        entries = [[spec.model_dump() for spec in specs] for specs in (recipe.rewards.functions, recipe.gold)]
        check_entries([*entries[0], *entries[1]], prompts.columns)  # before time goes into loading
        policy, module = load_generator(recipe, engine.device)
        freeze_references(policy, recipe)
        if ":" in (recipe.model.family or ""):
            pair = [with_pictures(prompt) for prompt in heldout.prompts[:2]]
            limit, grouped = recipe.logprob_limit, not recipe.engine.activation_checkpointing
            try_out(policy, pair, training_sampling(recipe), limit, engine.autocast, grouped)
        if recipe.rollout.workers and engine.is_main:
            # two, one that is judged, and a copy
            versions = 4 * sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
            actors = recipe.rewards.workers + recipe.rollout.workers
            owns_ray = start_ray(actors, OBJECT_STORE_BYTES + versions)
        keys = ("workers", "timeout_s", "max_restarts")
        settings = {key: getattr(recipe.rewards, key) for key in keys} | {"columns": prompts.columns}
        if engine.world_size > 1 and recipe.rewards.workers:
            scorer = SharedRewards(engine, entries[0], gold=entries[1], **settings)
        else:
            scorer = RewardWorkers(entries[0], gold=entries[1], policy=policy, **settings)
        engine.prepare(
            module,
            recipe.optim,
            recipe.run.steps * recipe.algorithm.updates_per_rollout,
            checkpoint.tensors if checkpoint else None,
            partial(lr_factor, recipe),
        )
        if recipe.rollout.workers:
            # Rewards given in Python may hold what no other process can have.
            bare = recipe.rewards.model_copy(update={"functions": []})
            build = partial(load_rollout, recipe.model_copy(update={"rewards": bare, "gold": []}))
            rollouts = RayRollouts(recipe, build, scorer, engine)
        else:
            rollout = RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, engine.autocast)
            rollouts = LocalRollouts(recipe, rollout, scorer, engine)
        eval_rollout = RolloutEngine(policy, evaluation_sampling(recipe), recipe.eval.seed, engine.autocast)
        trainer = Trainer(recipe, policy, sampler, rollouts, engine)
        if checkpoint:
            trainer.restore(checkpoint.state.get("trainer", {}), checkpoint.tensors)
        scorer.wait_until_ready()
        rollouts.wait_until_ready()
        begin_run(engine, folder, recipe, overwrite, command)
        for doubt in recipe.doubts if engine.is_main else ():
            print(f"imagerl: {doubt}", file=sys.stderr)
        run = Run(recipe, folder, trainer, heldout.prompts, eval_rollout, checkpoint)
        comparison = run.execute(resume is not False)
        if run.finished and engine.world_size > 1:
            if not engine.is_main:
                scorer.close()
            engine.barrier()  # the others have left Ray before it ends: that would end them too
        return comparison
    finally:
        if rollouts is not None:
            rollouts.close()
        if scorer is not None:
            scorer.close()
        if owns_ray:
            stop_ray()
        folder.release()
        engine.close()
