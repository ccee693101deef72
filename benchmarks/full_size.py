"""`python -m benchmarks.full_size`: the published 3B model with random weights, from its building to a trained step.

On a CPU (`--device cpu`) a few tokens and small pictures: does it run, and in what memory? On a GPU whole pictures, 10
minutes at most, and first whether the shipped model draws there what it draws on a CPU. One table. Never run on a GPU
yet: there was none."""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from imagerl.models.blip3o_next.outline import SizedModel
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import full_size_config
from imagerl.models.blip3o_next.weights import empty_policy, fill_randomly
from imagerl.models.families import base_folder, load_policy
from imagerl.rl.config.engine import EngineConfig, OptimConfig
from imagerl.rl.config.train import load_recipe
from imagerl.rl.engine.engine import Engine
from imagerl.rl.errors import ImageRLError
from imagerl.rl.training.memory import StepShape, step_bytes
from imagerl.rl.training.plan import make_plan
from imagerl.rl.types import Rows, SamplingParams

GIB = 2**30
PROMPT = 64  # ids
ROOM = {"cpu": 12.0, "cuda": 40.0}  # GiB that the defaults take at most
RECIPE = Path(__file__).parents[1] / "recipes" / "blip3o_next_ocr_grpo.yaml"


@dataclass
class Table:
    """Rows of what was done: seconds, the most memory so far, and a figure in words."""

    device: torch.device
    rows: list[tuple[str, float, float, list[str]]] = field(default_factory=list)

    @contextmanager
    def row(self, what: str) -> Iterator[list[str]]:
        """Measure what is done within, as a row; what is appended to the list, then or later, is its figure."""
        said: list[str] = []
        begun = self._now()
        yield said
        self.rows.append((what, self._now() - begun, peak_bytes(self.device), said))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __str__(self) -> str:
        width = max(len(row[0]) for row in self.rows)
        head = f"{'':<{width}}  seconds  GiB at most"
        lines = [
            f"{what:<{width}}  {seconds:7.1f}  {peak / GIB:11.2f}  {'; '.join(said)}".rstrip()
            for what, seconds, peak, said in self.rows
        ]
        return "\n".join([head, *lines])


def peak_bytes(device: torch.device) -> int:
    """Return the most that this process has held so far: on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def bandwidth(device: torch.device, megabytes: int) -> float:
    """Measure the bytes a second that the device's memory moves: a large copy, read and write counted."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(lambda: target.copy_(source), device) for _ in range(6)]  # the first is warm-up
    return 2 * source.numel() / statistics.median(seconds[1:])


def _timed(task: Callable[[], Any], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begun = time.perf_counter()
    task()
    synchronise()
    return time.perf_counter() - begun


def bytes_per_token(policy: ImagePolicy) -> int:
    """Count bytes of weights that one decoding step reads, for however many samples: all layers and the image head."""
    assert policy._sampler is not None
    layers = policy._sampler.layers
    tensors = [getattr(layer, name) for layer in layers for name in type(layer).__slots__]
    head = policy.trainable.head.numel() * policy.sampler_dtype.itemsize
    return head + sum(t.numel() * t.element_size() for t in tensors if t is not None)


def random_rows(policy: ImagePolicy, samples: int) -> tuple[Rows, Tensor, Tensor]:
    """Return one prompt, and the numbers that samples of it are drawn by: uniforms [G, T] and noise [G, C, h, w]."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (1, PROMPT), generator=numbers).to(policy.device)
    uniforms = torch.rand(samples, policy.num_actions, generator=numbers, dtype=torch.float64)
    noise = torch.randn(samples, *policy.latent_shape, generator=numbers).to(policy.device)
    return {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, uniforms, noise


def parity(table: Table, samples: int = 16) -> None:
    """Draw with the shipped model on the device and on the CPU, in float32: the same tokens, nearly the same
    log-probs and pixels."""
    found = []
    for device in ("cpu", table.device):
        policy: Any = load_policy("tiny", device)
        rows, uniforms, noise = random_rows(policy, samples)
        with table.row(f"shipped model on {device}") as said:
            drawn = policy.sample_tokens(rows, uniforms, SamplingParams())
            pictures = policy.decode(rows, drawn, noise, policy.sampling)
        found.append((drawn.tokens.cpu(), drawn.rollout_logprobs.cpu(), pictures.cpu()))
    (tokens, logprobs, pixels), (others, theirs, drawn_there) = found
    equal = (tokens == others).all(1)  # after one other token all that follow may differ
    gap = (logprobs - theirs)[equal].abs().max().item() if equal.any() else float("nan")
    colour = (pixels - drawn_there)[equal].abs().max().item() if equal.any() else float("nan")
    said.append(
        f"{equal.float().mean():.0%} of samples equal; of these log-probs to {gap:.1e}, pixels to {colour:.1e}"
    )


def sized(config: dict[str, Any], tokens: int | None, pixels: int | None) -> dict[str, Any]:
    """Return a config whose pictures have so many tokens and pixels a side; None: as it is."""
    config = copy.deepcopy(config)
    if tokens is not None:
        config["num_image_positions"] = tokens
    if pixels is not None:
        config["latent_size"] = [pixels // 2 ** (len(config["vae"]["encoder_block_out_channels"]) - 1)] * 2
    return config


def measure(
    table: Table, config: dict[str, Any], samples: int, micro_batch: int, flow_steps: int, rank: int
) -> None:
    """Build, sample, draw and train a step of LoRA, in bfloat16, and plan the same."""
    device = table.device
    before = peak_bytes(device)
    with table.row("build") as said:
        policy = empty_policy(config, None)
        fill_randomly(policy, torch.bfloat16, device, seed=0)
        for part in policy.parts().values():
            part.requires_grad_(False).eval().to(device)
        count = sum(p.numel() for part in policy.parts().values() for p in part.parameters())
        said.append(f"{count / 1e9:.2f} billion parameters")
    policy.sampler_dtype = torch.bfloat16
    with table.row("lay out the sampler"):
        policy.refresh_sampler()
    rows, uniforms, noise = random_rows(policy, samples)
    limit = samples * bandwidth(device, 1024 if device.type == "cuda" else 64) / bytes_per_token(policy)
    with table.row("sample") as said, torch.no_grad():
        trajectory = policy.sample_tokens(rows, uniforms, SamplingParams())
    speed = uniforms.numel() / table.rows[-1][1]
    said.append(f"{speed:.0f} tokens/s, {speed / limit:.0%} of what reading the weights allows")
    policy.release_sampler()
    with table.row("denoise"), torch.no_grad():
        latents = policy.decoder.latents(trajectory.states["hidden"], noise, 2.0, flow_steps)
    with table.row("draw pixels") as said, torch.no_grad():
        pictures = policy.decoder.draw(latents)
        height, width = pictures.shape[-2:]
        said.append(f"{samples} pictures of {width}x{height}")
    seconds = sum(row[1] for row in table.rows[-3:])
    policy.add_lora(rank, 2.0 * rank, 0.0, "all-linear")
    engine = Engine(EngineConfig.model_validate({"precision": "bf16", "device": device.type}))
    engine.prepare(policy.trainable, OptimConfig(), 2)
    try:
        with table.row("train a step of LoRA") as said:
            for start in range(0, samples, micro_batch):
                few = slice(start, start + micro_batch)
                with engine.microbatch(last=start + micro_batch >= samples):
                    with engine.autocast():
                        scores = engine.module(rows, trajectory.tokens[few], SamplingParams())
                    ratio = (scores.logprobs - trajectory.rollout_logprobs[few].to(device)).exp()
                    engine.backward(-ratio.mean())
            said.append(f"gradient norm {engine.step():.2g}")
    finally:
        engine.close()
    peak = peak_bytes(device) - (before if device.type == "cpu" else 0)
    with table.row("plan") as said:
        said.append(planned(config, samples, micro_batch, rank, peak))
    said.append(f"{samples / (seconds + table.rows[-2][1]):.3g} pictures/s from tokens to the update")


def planned(config: dict[str, Any], samples: int, micro_batch: int, rank: int, peak: int) -> str:
    """Say what `imagerl plan` foretells of the same step, beside a measured peak."""
    recipe = load_recipe(
        str(RECIPE),
        [
            f"model.lora={{r: {rank}}}",
            f"engine.micro_batch_size={micro_batch}",
            "rollout.prompts_per_step=1",
            f"rollout.group_size={samples}",
            "algorithm.kl_coef=0",
        ],
    )
    outline = SizedModel(config)
    policy, later = outline.policy(), samples > micro_batch
    shape = StepShape(1, samples, PROMPT, policy.num_actions, micro_batch, later, policy.latent_shape)
    plan = make_plan(recipe, 1, shape, step_bytes(outline.policy, recipe, shape, {}))
    return f"{plan.peak / GIB:.2f} GiB, most while {plan.busiest}; measured {peak / GIB:.2f}"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    size: Annotated[
        str, typer.Option(help="full: the published 3B model; or tiny, or a model folder")
    ] = "full",
    samples: Annotated[int | None, typer.Option(min=1, help="default: 2 on a CPU, 32 on a GPU")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="of a picture; default: 12 on a CPU, 729")] = None,
    pixels: Annotated[int | None, typer.Option(min=32, help="of a side; default: 64 on a CPU, 1024")] = None,
    flow_steps: Annotated[int | None, typer.Option(min=1, help="default: 2 on a CPU, 30 on a GPU")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="samples of a forward and backward pass")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="of LoRA")] = 16,
) -> None:
    """Build the full-size model with random weights, draw with it, train a step, and print one table."""
    on_cpu, full = device == "cpu", size == "full"
    if not on_cpu and not torch.cuda.is_available():
        raise ImageRLError("there is no GPU here; give --device cpu")
    if full:
        require_memory(device)
    config = full_size_config(vision_tower=False) if full else dict(SizedModel.of(base_folder(size)).config)
    if full and on_cpu:
        tokens, pixels = tokens or 12, pixels or 64
    table = Table(torch.device(device))
    if not on_cpu:
        parity(table)
    measure(
        table,
        sized(config, tokens, pixels),
        samples or (2 if on_cpu else 32),
        micro_batch,
        flow_steps or (2 if on_cpu else 30),
        rank,
    )
    print(table)


def require_memory(device: str) -> None:
    """Raise ImageRLError unless the defaults fit what is free."""
    import psutil  # type: ignore[import-untyped]

    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    if free < ROOM[device] * GIB:
        raise ImageRLError(
            f"the full-size model needs about {ROOM[device]:g} GiB and {free / GIB:.1f} are free; try --size tiny"
        )


if __name__ == "__main__":
    from imagerl.rl.commands.cli import main as run

    script = typer.Typer()
    script.command()(main)
    run(program=script, called="benchmarks.full_size")
