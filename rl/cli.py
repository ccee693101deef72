"""The command line, and the one place where models, rewards and the trainer are put together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.exceptions import TyperException

from rl.config import Recipe, load_recipe
from rl.errors import ImageRLError

if TYPE_CHECKING:
    from models.image_policy import ImagePolicy
    from rl.engine import Engine
    from rl.rollout import RolloutEngine

T = TypeVar("T")
INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for autoregressive + flow-matching image generators.",
)
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="recipe overrides, values in YAML")
]
Model = Annotated[str, typer.Option(help='model folder, LoRA adapter folder, or "tiny"')]
Seed = Annotated[int, typer.Option(help="seed of tokens and noise")]
Temperature = Annotated[float, typer.Option(min=1e-3, help="sampling temperature")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance; default: the model's own")]
FlowSteps = Annotated[int | None, typer.Option(min=1, help="denoising steps; default: the model's own")]


@app.command()
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
    from rl.rollout import RolloutEngine
    from rl.run import Run, RunFolder
    from rl.seeding import derive_seed
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
        policy, _ = load_policy(recipe.model.path, engine.device)
        if recipe.engine.precision == "bf16":
            policy.sampler_dtype = torch.bfloat16
        if recipe.model.lora:
            lora = recipe.model.lora
            torch.manual_seed(derive_seed(recipe.run.seed, "lora"))  # adapters begin at random
            policy.trainable.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
        if recipe.algorithm.kl_coef > 0:
            policy.freeze_reference()
        scorer = RewardWorkers(
            [spec.model_dump() for spec in recipe.rewards.functions],
            gold=[spec.model_dump() for spec in recipe.gold],
            workers=recipe.rewards.workers,
            timeout_s=recipe.rewards.timeout_s,
            max_restarts=recipe.rewards.max_restarts,
            columns=prompts.columns,
        )
        engine.prepare(
            policy.trainable,
            recipe.optim,
            recipe.run.steps * recipe.algorithm.updates_per_rollout,
            checkpoint.tensors if checkpoint else None,
        )
        settings = recipe.rollout
        sampling = SamplingParams(
            settings.temperature, settings.guidance, settings.flow_steps, settings.shared_noise
        )
        rollout = RolloutEngine(policy, sampling, recipe.run.seed, engine.autocast)
        eval_rollout = RolloutEngine(policy, sampling, recipe.eval.seed, engine.autocast)
        trainer = Trainer(recipe, policy, scorer, sampler, rollout, engine)
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


def loaded_rollout(
    model: str, seed: int, temperature: float, guidance: float | None, flow_steps: int | None
) -> tuple[ImagePolicy, RolloutEngine]:
    """A policy for inference, on the GPU where there is one, with its own sampling defaults."""
    from contextlib import nullcontext

    import torch

    from models.loading import load_policy
    from rl.rollout import RolloutEngine
    from rl.types import SamplingParams

    policy, config = load_policy(model, "cuda" if torch.cuda.is_available() else "cpu")
    defaults = config["sampling"]
    sampling = SamplingParams(
        temperature,
        defaults["guidance"] if guidance is None else guidance,
        defaults["flow_steps"] if flow_steps is None else flow_steps,
    )
    return policy, RolloutEngine(policy, sampling, seed, nullcontext)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="captions to draw")],
    model: Model = "tiny",
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="pictures of each prompt")] = 4,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
) -> None:
    """Draw pictures and a grid of them."""
    import numpy as np

    from rl.metrics import image_grid, save_image
    from rl.types import Prompt

    _, rollout = loaded_rollout(model, seed, temperature, guidance, flow_steps)
    wanted = [Prompt(index, text) for index, text in enumerate(prompts)]
    captions, images = [], []
    for (group,) in rollout.generate(wanted, count, "sample", 1):
        for number, image in enumerate(group.images):
            save_image(_picture(image), out / f"{group.prompt.index:03d}_{number:02d}.png")
            captions.append(group.prompt.text)
            images.append(image)
    scale = max(1, 192 // images[0].shape[1])
    grid = save_image(image_grid(np.stack(images), count, captions, scale), out / "grid.png")
    print(f"{len(images)} pictures and {grid}")


def _picture(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray(image)


@app.command("eval")
def evaluate_model(
    model: Model = "tiny",
    suite: Annotated[str, typer.Option(help="what to measure: ocr")] = "ocr",
    n: Annotated[int, typer.Option("--n", min=1, help="held-out prompts, one picture each")] = 256,
    json: Annotated[Path | None, typer.Option(help="write results and every prompt's values here")] = None,
    seed: Seed = 0,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="score perfect pictures, not a model's")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at a time")] = 64,
    temperature: Temperature = 1.0,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
) -> None:
    """Measure a model on held-out prompts, with 95 % intervals."""
    from rewards.suites import SUITES
    from rewards.workers import RewardWorkers
    from rl.evaluate import GroundTruth, Source, evaluate
    from rl.files import write_atomic
    from rl.metrics import to_json
    from rl.tiny_world import prompt_set, truth

    if suite not in SUITES:
        raise ImageRLError(f"no suite is named {suite!r}; there is: {', '.join(SUITES)}")
    prompts = prompt_set("heldout", n)
    scorer = RewardWorkers(SUITES[suite], workers=0, columns=prompts[0].columns)
    _, rollout = loaded_rollout(model, seed, temperature, guidance, flow_steps)
    source: Source = GroundTruth(truth) if ceiling else rollout
    result = evaluate(suite, prompts, source, scorer, batch_size)
    for name, interval in result.metrics.items():
        print(
            f"{name:>20}  {interval.mean:.3f}  (95 % {interval.low:.3f} to {interval.high:.3f}, n={interval.n})"
        )
    if json is not None:
        facts = (
            {"model": "ground truth"}
            if ceiling
            else {"model": model, "seed": seed} | asdict(rollout.sampling)
        )
        document = result.to_dict(**facts)
        write_atomic(json, to_json(document, indent=1) + "\n")
        print(f"written: {json}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="run folder, or one of its checkpoints/step_*")],
    target: Annotated[Path, typer.Argument(help="new folder")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="keep a LoRA adapter instead of merging it")
    ] = False,
    dtype: Annotated[str, typer.Option(help="how weights are stored: fp32 or bf16")] = "fp32",
) -> None:
    """Write a trained policy as a model folder and prove that it draws the same pictures."""
    import torch

    from rl.export import export as write_export

    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise ImageRLError(f"--dtype must be fp32 or bf16, not {dtype!r}")
    provenance = write_export(source, target, adapter, dtypes[dtype])
    print(f"{target}: step {provenance['step']}, reloaded and proved equal in tokens and pixels")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="pretraining recipe YAML")], overrides: Overrides = None
) -> None:
    """Pretrain a tiny model from pictures rendered on the fly. Finished stages are kept and not repeated."""
    import torch

    from models.building import new_policy
    from models.loading import load_state, read_weights, save_policy
    from rl.pretrain import captions, resolve_device
    from rl.pretrain import pretrain as run_stages
    from rl.pretrain_config import PretrainRecipe
    from rl.recipe import load_yaml_recipe
    from rl.seeding import derive_seed

    settings = load_yaml_recipe(PretrainRecipe, recipe, overrides or [])
    seed = settings.run.seed
    torch.manual_seed(derive_seed(seed, "init"))
    policy, config = new_policy(settings.model, captions(seed, 500), settings.text_tokenizer.vocabulary)
    policy.to(resolve_device(settings.run.device))

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(policy, folder, config, torch.bfloat16)

    def load(folder: Path) -> None:
        load_state(policy, read_weights(folder), folder)

    run_stages(policy, settings, save, load)
    print(f"model: {Path(settings.run.output_dir) / 'model'}")


bench = typer.Typer(no_args_is_help=True, help="Measure speed, as ratios and shares within one run.")
app.add_typer(bench, name="bench")
ReportFile = Annotated[Path | None, typer.Option("--json", help="write the numbers here too")]


@bench.command("rollout")
def bench_rollout(
    model: Model = "tiny",
    prompts: Annotated[int, typer.Option(min=1, help="prompts of a batch")] = 4,
    group_size: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the median counts")] = 5,
    json: ReportFile = None,
) -> None:
    """Sampling and decoding, beside transformers' generate with the same weights and lengths."""
    from rl import bench as benchmarks
    from rl.tiny_world import prompt_set

    policy, rollout = loaded_rollout(model, 0, 1.0, None, None)
    report = benchmarks.bench_rollout(policy, rollout, prompt_set("train", prompts), group_size, repeats)
    benchmarks.show(report, json)


@bench.command("step")
def bench_step(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")] = "recipes/tiny_ocr_grpo.yaml",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="training steps; the first is warm-up")] = 4,
    json: ReportFile = None,
) -> None:
    """Whole training steps of a recipe: tokens trained, share of each phase, reward time that nothing hides."""
    import tempfile

    from models.loading import load_policy
    from rl import bench as benchmarks

    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"run.output_dir={scratch}/run", f"run.steps={steps}", "eval.every=0", "eval.size=2"]
        settings = load_recipe(recipe, [*(overrides or []), *fixed])
        tokens = load_policy(settings.model.path)[0].num_actions
        run_training(settings)
        batch = settings.rollout.prompts_per_step * settings.rollout.group_size
        report = benchmarks.bench_step(Path(scratch) / "run", batch * tokens)
    benchmarks.show(report, json)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `imagerl` command. What the user can mend is one line on stderr; the exit code is then 1, or 2 when the
    command itself was misspelt."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = sys.argv[1:] if arguments is None else list(arguments)
    rank = os.environ.get("RANK", "0")
    name = "imagerl" if rank == "0" else f"imagerl (process {rank})"
    try:
        code = app(args=given or ["--help"], prog_name="imagerl", standalone_mode=False)
    except ImageRLError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 1
    except TyperException as error:  # usage
        message = " ".join(error.format_message().split())
        print(f"{name}: {message.rstrip('.')}; see imagerl --help", file=sys.stderr)
        code = error.exit_code
    if code == INTERRUPTED:
        print(f"{name}: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
