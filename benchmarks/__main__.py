"""`python -m benchmarks`: how fast it is, as ratios and shares within one run. Not part of the package."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from imagerl.api.drawing import loaded_rollout
from imagerl.rl.commands.cli import main
from imagerl.rl.commands.options import Model, Overrides
from imagerl.rl.errors import ImageRLError

bench = typer.Typer(no_args_is_help=True, help="Measure speed, as ratios and shares within one run.")
ReportFile = Annotated[Path | None, typer.Option("--json", help="write the numbers here too")]


@bench.command("rollout")
def bench_rollout(
    model: Model = "tiny",
    prompts: Annotated[int, typer.Option(min=1, help="prompts of a batch")] = 4,
    group_size: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the median counts")] = 5,
    json: ReportFile = None,
) -> None:
    """Time sampling and decoding, beside transformers' generate with the same weights and lengths."""
    from benchmarks import measuring as benchmarks
    from imagerl.rl.data.tiny.world import prompt_set

    rollout = loaded_rollout(model, 0)
    report = benchmarks.bench_rollout(rollout, prompt_set("train", prompts), group_size, repeats)
    benchmarks.show(report, json)


@bench.command("step")
def bench_step(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="training steps; the first is warm-up")] = 4,
    json: ReportFile = None,
) -> None:
    """Time whole training steps of a recipe: tokens trained, share of each phase, reward time that nothing hides."""
    from benchmarks import measuring as benchmarks

    benchmarks.show(trained_steps(recipe, overrides or [], steps), json)


@bench.command("reference")
def bench_reference(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="training steps of each; an even number")] = 6,
    json: ReportFile = None,
) -> None:
    """Time training steps of a recipe beside the public code's way of taking them, on the same model."""
    import torch

    from benchmarks import measuring as benchmarks
    from benchmarks.reference import ReferenceStep, compared
    from imagerl.models.families import load_policy
    from imagerl.rewards.base import RewardSpec, load_rewards
    from imagerl.rewards.workers.scoring import score_request
    from imagerl.rl.config.train import load_recipe

    settings = load_recipe(recipe, overrides or [])
    torch.set_num_threads(settings.engine.threads or torch.get_num_threads())
    torch.manual_seed(settings.run.seed)
    policy = load_policy(settings.model.path, "cpu")
    specs = [RewardSpec.from_mapping(spec.model_dump()) for spec in settings.rewards.functions]
    theirs = ReferenceStep(policy, settings, partial(score_request, load_rewards(specs)))
    ours = partial(trained_steps, recipe, overrides or [], steps + 1)
    benchmarks.show(compared(theirs, ours, steps), json)


@bench.command("rewards")
def bench_rewards(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="training steps; the first is warm-up")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the median counts")] = 3,
    json: ReportFile = None,
) -> None:
    """Time each reward of a recipe on the pictures of one step, and how much of the scoring training waits for."""
    from benchmarks import measuring as benchmarks
    from benchmarks.rewards import bench_rewards as measure
    from imagerl.rewards.base import RewardSpec, load_rewards
    from imagerl.rewards.workers.scoring import call_reward
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.rollout.engine import reward_request, training_sampling

    settings = load_recipe(recipe, overrides or [])
    prompts = load_prompt_set(settings.data.train).prompts[: settings.rollout.prompts_per_step]
    sampling = training_sampling(settings)
    rollout = loaded_rollout(
        settings.model.path, 0, sampling.temperature, sampling.guidance, sampling.flow_steps
    )
    (groups,) = rollout.generate(prompts, settings.rollout.group_size, "bench")
    request = reward_request(groups)
    specs = [RewardSpec.from_mapping(spec.model_dump()) for spec in settings.rewards.functions]
    scores = {reward.label: partial(call_reward, reward, request) for reward in load_rewards(specs)}
    step = trained_steps(recipe, overrides or [], steps)
    report = measure(scores, len(request.prompts), repeats, settings.rewards.workers, step)
    benchmarks.show(report, json)


def trained_steps(recipe: str, overrides: list[str], steps: int) -> dict[str, float]:
    """Report on a few training steps of a recipe, in a folder that is then removed."""
    import tempfile

    from benchmarks import measuring as benchmarks
    from imagerl.api.training import run_training
    from imagerl.models.families import load_prompts
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.types import Prompt

    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"run.output_dir={scratch}/run", f"run.steps={steps}", "eval.every=0", "eval.size=2"]
        settings = load_recipe(recipe, [*overrides, *fixed])
        tokens = load_prompts(settings.model.path).canvas(Prompt(0, "")).tokens
        run_training(settings)
        batch = settings.rollout.prompts_per_step * settings.rollout.group_size
        return benchmarks.bench_step(Path(scratch) / "run", batch * tokens)


@bench.command("variance")
def bench_variance(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=2, help="prompts of the measurement")] = 32,
    group_size: Annotated[int, typer.Option(min=2, help="token sequences of each")] = 8,
    decodes: Annotated[int, typer.Option(min=2, help="pictures of each sequence")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="rounds of timing; the median counts")] = 5,
    json: ReportFile = None,
) -> None:
    """Measure what rollout.shared_noise and rollout.decodes buy for the tokens' gradient at equal cost."""
    from contextlib import nullcontext

    import torch

    from benchmarks import measuring as benchmarks
    from benchmarks.variance import gains, measure
    from imagerl.models.families import load_policy
    from imagerl.rewards.base import RewardSpec, load_rewards
    from imagerl.rewards.workers.scoring import score_request
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.rollout.engine import RolloutEngine, training_sampling
    from imagerl.rl.training.halves import trained_module

    settings = load_recipe(recipe, overrides or [])
    torch.set_num_threads(settings.engine.threads or torch.get_num_threads())
    policy = load_policy(settings.model.path, "cuda" if torch.cuda.is_available() else "cpu")
    trained_module(policy, settings)
    sampling = replace(training_sampling(settings), shared_noise=True, decodes=decodes)
    rollout = RolloutEngine(policy, sampling, settings.run.seed, nullcontext)
    specs = [RewardSpec.from_mapping(spec.model_dump()) for spec in settings.rewards.functions]
    score = partial(score_request, load_rewards(specs))
    train = load_prompt_set(settings.data.train).prompts[:prompts]
    rewards, seconds = measure(policy, rollout, score, train, group_size, repeats)
    benchmarks.show(gains(rewards, seconds), json)


@bench.command("signal")
def bench_signal(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=3, help="steps, each on prompts of its own")] = 6,
    json: ReportFile = None,
) -> None:
    """Measure how much of a step's gradient is more than noise, the weights held still: can this reward teach?"""
    from benchmarks import measuring as benchmarks
    from benchmarks.signal import gradients, shared

    given = [*(overrides or []), "algorithm.updates_per_rollout=1"]
    benchmarks.show(shared(gradients(lambda: trained_steps(recipe, given, steps))), json)


@bench.command("algorithms")
def bench_algorithms(
    samples: Annotated[int, typer.Option(min=2, help="samples of an update")] = 96,
    actions: Annotated[int, typer.Option(min=1, help="image tokens of a sample")] = 64,
    group_size: Annotated[int, typer.Option(min=2, help="samples of a prompt; divides them")] = 16,
    vocabulary: Annotated[int, typer.Option(min=2, help="image tokens to choose from")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the median counts")] = 20,
    json: ReportFile = None,
) -> None:
    """Measure what each algorithm's update costs over plain GRPO's, on the same tensors."""
    import torch

    from benchmarks import measuring as benchmarks
    from benchmarks.algorithms import bench_algorithms as measure

    if samples % group_size:
        raise ImageRLError(f"--group-size {group_size} must divide --samples {samples}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmarks.show(measure(samples, actions, group_size, vocabulary, repeats, device), json)


if __name__ == "__main__":
    main(program=bench, called="benchmarks")
