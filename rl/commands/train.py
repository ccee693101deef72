"""`imagerl train`: where models, rewards and the trainer are put together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rl.commands.options import Overrides
from rl.config import Recipe, load_recipe
from rl.errors import ImageRLError

if TYPE_CHECKING:
    from rl.engine import Engine

T = TypeVar("T")


def train(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in run.output_dir")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in run.output_dir")] = False,
) -> None:
    """Train a policy as a recipe says."""
    settings = load_recipe(recipe, overrides or [])
    if resume and overwrite:
        raise ImageRLError("--resume continues the run and --overwrite deletes it; give only one")
    comparison = run_training(settings, resume, overwrite)
    if comparison is None:
        return
    print(closing_line(comparison))


def closing_line(comparison: Mapping[str, Any]) -> str:
    """Held-out exact match before → after, or the first reward where none measures it."""
    headline = "exact_match" if "exact_match" in comparison else next(iter(comparison), None)
    if headline is None:
        return "held-out: no sample could be scored both before and after"
    result = comparison[headline]
    gap = result["difference"]
    scale, digits, unit, points = (100, 1, " %", " points") if headline == "exact_match" else (1, 3, "", "")
    before, after = (f"{scale * result[when]:.{digits}f}{unit}" for when in ("before", "after"))
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (gap.mean, gap.low, gap.high))
    return (
        f"held-out {headline.replace('_', ' ')}: {before} → {after} "
        f"({mean}{points}, 95 % interval {low} to {high}, n={gap.n})"
    )


def run_training(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Put a run together and execute it; returns the held-out comparison, None when it was stopped early and on
    all but the main process. The run folder is written to only once everything else is found in order."""
    import torch

    from models.loading import load_policy
    from rewards.workers import RewardWorkers
    from rl.checkpoint import load_checkpoint
    from rl.data import GroupedSampler, load_prompt_set, refuse_overlap
    from rl.engine import Engine
    from rl.environment import write_environment
    from rl.halves import freeze_references, lr_factor, trained_module
    from rl.rollout import RolloutEngine
    from rl.run import Run, RunFolder
    from rl.trainer import Trainer
    from rl.types import SamplingParams

    prompts, heldout = load_prompt_set(recipe.data.train), load_prompt_set(recipe.data.heldout)
    refuse_overlap(prompts, heldout)
    sampler = GroupedSampler(prompts, recipe.rollout.prompts_per_step, recipe.run.seed)
    folder = RunFolder(recipe.run.output_dir)
    engine = Engine(recipe.engine)
    scorer = None
    try:
        if recipe.rollout.prompts_per_step % engine.world_size:
            raise ImageRLError(
                f"rollout.prompts_per_step ({recipe.rollout.prompts_per_step}) must be divisible by the "
                f"{engine.world_size} processes"
            )
        newest = None
        if resume:
            newest = on_main(engine, lambda: folder.resumable(recipe))
        else:
            on_main(engine, folder.refuse_foreign if overwrite else folder.refuse_run)
        checkpoint = load_checkpoint(newest) if newest else None
        storage = torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32
        policy, _ = load_policy(recipe.model.path, engine.device, storage)
        if recipe.engine.precision == "bf16":
            policy.sampler_dtype = torch.bfloat16
        module = trained_module(policy, recipe)
        freeze_references(policy, recipe)
        scorer = RewardWorkers(
            [spec.model_dump() for spec in recipe.rewards.functions],
            gold=[spec.model_dump() for spec in recipe.gold],
            workers=recipe.rewards.workers,
            timeout_s=recipe.rewards.timeout_s,
            max_restarts=recipe.rewards.max_restarts,
            columns=prompts.columns,
        )
        engine.prepare(
            module,
            recipe.optim,
            recipe.run.steps * recipe.algorithm.updates_per_rollout,
            checkpoint.tensors if checkpoint else None,
            partial(lr_factor, recipe),
        )
        settings = recipe.rollout
        sampling = SamplingParams(
            settings.temperature,
            settings.guidance,
            settings.flow_steps,
            settings.shared_noise,
            settings.decodes,
        )
        rollout = RolloutEngine(policy, sampling, recipe.run.seed, engine.autocast)
        shown = replace(
            sampling,
            guidance=sampling.guidance if recipe.eval.guidance is None else recipe.eval.guidance,
            flow_steps=recipe.eval.flow_steps or sampling.flow_steps,
            decodes=1,
        )
        eval_rollout = RolloutEngine(policy, shown, recipe.eval.seed, engine.autocast)
        trainer = Trainer(recipe, policy, scorer, sampler, rollout, engine)
        if checkpoint:
            trainer.restore(checkpoint.state.get("trainer", {}), checkpoint.tensors)
        scorer.wait_until_ready()

        def begin() -> None:
            folder.begin(recipe, overwrite)
            write_environment(folder.path, sys.argv)

        on_main(engine, begin)
        return Run(recipe, folder, trainer, heldout.prompts, eval_rollout, checkpoint).execute(resume)
    finally:
        if scorer is not None:
            scorer.close()
        engine.close()


def on_main(engine: Engine, action: Callable[[], T]) -> T:
    """Do something on the main process only; what it returns, or its ImageRLError, comes to all of them."""
    outcome: Any = None
    if engine.is_main:
        try:
            outcome = action()
        except ImageRLError as error:
            outcome = error
    outcome = engine.gather_objects(outcome)[0]
    if isinstance(outcome, ImageRLError):
        raise outcome
    return outcome
