"""The memory that a recipe needs on each GPU: weights and their kin, and the step's most demanding moment.

Bytes of single steps come from `rl.engine.memory`; here they are put together for a number of GPUs and a ZeRO stage
(arXiv 1910.02054)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.memory import Bytes, StepShape
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Canvas

GIB = 2**30
FLOAT32 = 4
MOMENTS = 2 * FLOAT32  # Adam's two running means of each number
BUCKET = 50_000_000  # numbers; see `rl.engine.zero.fit_config`
USABLE = 0.9  # of a GPU: the rest is its context, its libraries' workspaces and fragmentation


@dataclass(frozen=True, slots=True)
class Plan:
    """The bytes needed on each of `gpus` GPUs."""

    gpus: int
    parts: Mapping[str, float]  # there all the time, once the first step is done
    phases: Mapping[str, float]  # beside the parts; one after the other, so only the largest counts

    @property
    def busiest(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> float:
        return sum(self.parts.values()) + self.phases[self.busiest]


def step_shape(
    recipe: Recipe, gpus: int, prompt_tokens: int, canvas: Canvas, edits: bool = False
) -> StepShape:
    """Return the work that one of `gpus` processes does at once. Raises ImageRLError when they cannot share a step's
    prompts."""
    import torch

    rollout, engine = recipe.rollout, recipe.engine
    if rollout.prompts_per_step < gpus:
        raise ImageRLError(f"{gpus} GPUs cannot share {rollout.prompts_per_step} prompts a step")
    own = math.ceil(rollout.prompts_per_step / gpus)
    sampled = min(rollout.sample_chunk or own, own)
    drawn = min(rollout.decode_chunk or sampled, sampled) * rollout.group_size
    evaluated = max(recipe.eval.batch_size, recipe.run.sample_prompts)  # one picture of each prompt
    micro_batch = min(engine.micro_batch_size, own * rollout.group_size)
    whole_groups = engine.micro_batch_size % rollout.group_size == 0
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return StepShape(
        sampled=max(sampled, math.ceil(evaluated / rollout.group_size)),
        group=rollout.group_size,
        pictures=max(drawn, evaluated),
        prompt_tokens=prompt_tokens,
        image_tokens=canvas.tokens,
        micro_batch=micro_batch,
        share=rollout.group_size if whole_groups and not engine.activation_checkpointing else 1,
        guidance=rollout.guidance,
        token_guidance=rollout.token_guidance,
        noise=canvas.noise,
        sampler_dtype=types[engine.precision],
        storage=types[recipe.model.dtype],
        bf16=engine.precision == "bf16",
        recompute=engine.activation_checkpointing,
        edits=max(sampled, evaluated) if edits else 0,
    )


def make_plan(recipe: Recipe, gpus: int, shape: StepShape, language: Bytes, decoder: Bytes) -> Plan:
    """Put together what `token_half_bytes` and `decoder_bytes` found."""
    storage, stage = shape.storage.itemsize, recipe.engine.zero_stage
    shards = gpus if stage else 1
    trained, gradients = language["trained"] * FLOAT32, language["gradients"]
    offloaded = recipe.engine.offload_optimizer
    copied = recipe.algorithm.kl_coef > 0 and recipe.model.lora is None
    parts = {
        "language model, trained": trained / (gpus if stage == 3 else 1),
        "language model, frozen": round(language["weights"] - language["trained_base"]) * storage,
        "KL reference": language["weights"] * storage if copied else 0.0,
        **{
            name.removeprefix("part "): count * storage
            for name, count in decoder.items()
            if name.startswith("part ")
        },
        "optimizer state": 0.0 if offloaded else language["trained"] * MOMENTS / shards,
        "ZeRO's own float32 copy": trained / gpus if stage and not offloaded else 0.0,
    }
    several = (
        math.ceil(recipe.rollout.prompts_per_step / gpus) * recipe.rollout.group_size > shape.micro_batch
    )
    activations = language["update" if several else "update_first"] - (gradients if several else 0.0)
    held = gradients
    if stage is not None and stage >= 2:
        held = gradients / gpus
        activations += 2 * min(BUCKET * FLOAT32, 2 * trained)
    elif gpus > 1 and not stage:
        parts["gradients"], held = gradients, 0.0  # in buckets that stay
    on_cpu = recipe.engine.device == "cpu"
    # on a GPU all parameters are updated at once and need one more tensor each, on a CPU one after the other
    update = 2 * language["largest"] * FLOAT32 if on_cpu else trained / shards
    if stage:
        update += trained / gpus  # the averaged gradients of this rank's share
    sampler = language["sampler"]
    whole = trained if stage == 3 else 0.0  # gathered while the sampler copies them
    phases = {
        # with the sampler's copy of the weights, which is released before the update
        "copying weights for sampling": language["laying_out"] + whole,
        "sampling tokens": sampler + language["sampling"],
        **({"reading pictures to edit": sampler + decoder["reading"]} if "reading" in decoder else {}),
        "drawing pictures": sampler + decoder["drawing"] + language["hidden"],
        "scoring by the reference": language["reference"] if recipe.algorithm.kl_coef > 0 else 0.0,
        "forward and backward": activations + (held if several else 0.0),
        "optimizer step": held + update,
    }
    return Plan(gpus, {name: value for name, value in parts.items() if value}, phases)


def table(plans: Sequence[Plan], gpu_memory: float | None) -> str:
    """Lay out GiB by part and moment, a column for each number of GPUs."""
    small = max(plan.peak for plan in plans) < GIB
    unit, name = (2**20, "MiB") if small else (GIB, "GiB")
    rows = [[f"{name} per GPU", *(f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}" for plan in plans)]]

    def add(name: str, values: Sequence[float], marks: Sequence[str] = ()) -> None:
        shown = [f"{value / unit:.1f}" for value in values]
        rows.append([name, *(a + b for a, b in zip(shown, marks or [""] * len(shown), strict=True))])

    for name in dict.fromkeys(name for plan in plans for name in plan.parts):
        add(name, [plan.parts.get(name, 0.0) for plan in plans])
    for name in plans[0].phases:
        marks = ["*" if plan.busiest == name else "" for plan in plans]
        add(f"  {name}", [plan.phases[name] for plan in plans], marks)
    add("peak = parts + *", [plan.peak for plan in plans])
    if gpu_memory is not None:
        fits = ["fits" if plan.peak <= USABLE * gpu_memory * GIB else "too much" for plan in plans]
        rows.append([f"on {gpu_memory:g} GiB, {USABLE:.0%} usable", *fits])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *cells in rows:
        padded = [
            cell.rjust(width + (not cell.endswith("*")))
            for cell, width in zip(cells, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *(cell.rstrip() for cell in padded)]))
    return "\n".join(lines)
