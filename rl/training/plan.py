"""The memory that a recipe needs on each GPU: weights and their kin, and the step's most demanding moment.

The bytes of a step come from `rl.training.memory`; here they are put together for a number of GPUs and a ZeRO stage
(arXiv 1910.02054)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.training.memory import Bytes, StepShape
from imagerl.rl.types import Canvas

GIB = 2**30
FLOAT32 = 4
MOMENTS = 2 * FLOAT32  # Adam's two running means of each number
BUCKET = 50_000_000  # numbers; see `rl.engine.zero.fit_config`
COPYING, SAMPLING, READING = "copying weights for sampling", "sampling tokens", "reading pictures to edit"
DRAWING, SCORING = "drawing pictures", "scoring by the reference"
UPDATE, OPTIMIZER = "forward and backward", "optimizer step"
USABLE = 0.9  # of a GPU: the rest is its context, its libraries' workspaces and fragmentation


@dataclass(frozen=True, slots=True)
class Plan:
    """The bytes needed on each of the `gpus` GPUs that do the same."""

    gpus: int
    parts: Mapping[str, float]  # there all the time, once the first step is done
    phases: Mapping[str, float]  # beside the parts; one after the other, so only the largest counts
    draws: bool = False  # for others: the GPU of a rollout actor
    waiting: float = 0.0  # of the parts, in host memory while weights are updated

    def memory_at(self, phase: str) -> float:
        away = self.waiting if phase in (UPDATE, OPTIMIZER) else 0.0
        return sum(self.parts.values()) - away + self.phases[phase]

    @property
    def busiest(self) -> str:
        return max(self.phases, key=self.memory_at)

    @property
    def peak(self) -> float:
        return self.memory_at(self.busiest)

    @property
    def title(self) -> str:
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}{' to draw' if self.draws else ''}"


def training_gpus(recipe: Recipe, gpus: int) -> int:
    """Return how many of a run's GPUs train: those that rollout actors and rewards do not reserve for themselves.

    Raises ImageRLError where none are left."""
    rewards = sum(spec.num_gpus for spec in (*recipe.rewards.functions, *recipe.gold))
    reserved = actor_gpus(recipe) + math.ceil(recipe.rewards.workers * rewards)
    if reserved >= gpus:
        raise ImageRLError(
            f"rollout actors and rewards reserve {reserved} GPUs, and {gpus} leave none to train; give more, or lower "
            "rollout.workers, rewards.workers or num_gpus"
        )
    return gpus - reserved


def actor_gpus(recipe: Recipe) -> int:
    """Return how many GPUs the rollout actors of a run reserve."""
    each = recipe.rollout.num_gpus
    return math.ceil(recipe.rollout.workers * (1.0 if each is None else each))


def step_shape(
    recipe: Recipe,
    gpus: int,
    prompt_tokens: int,
    canvas: Canvas,
    edits: bool = False,
    actor: bool = False,
) -> StepShape:
    """Return the work that one of `gpus` training processes, or a rollout `actor`, does at once. Raises ImageRLError
    when they cannot share a step's prompts."""
    rollout = recipe.rollout
    if rollout.prompts_per_step < gpus:
        raise ImageRLError(f"{gpus} GPUs cannot share {rollout.prompts_per_step} prompts a step")
    own = math.ceil(rollout.prompts_per_step / gpus)
    asked = min(own, math.ceil(rollout.prompts_per_step / rollout.workers)) if actor else own
    sampled = min(rollout.sample_chunk or asked, own)
    micro_batch = min(recipe.engine.micro_batch_size, own * rollout.group_size)
    drawn = min(rollout.decode_chunk or sampled, sampled) * rollout.group_size * rollout.decodes
    evaluated = max(recipe.eval.batch_size, recipe.run.sample_prompts)  # one picture of each prompt
    if actor:
        evaluated = 0
    elif rollout.workers:  # others draw all but the evaluations
        sampled = drawn = 0
    return StepShape(
        sampled=max(sampled, math.ceil(evaluated / rollout.group_size)),
        pictures=max(drawn, evaluated),
        prompt_tokens=prompt_tokens,
        image_tokens=canvas.tokens,
        micro_batch=micro_batch,
        # the buckets of plain data parallelism stay from step to step
        later=own * rollout.group_size > micro_batch or (gpus > 1 and not recipe.engine.zero_stage),
        noise=canvas.noise,
        edits=max(sampled, evaluated) if edits else 0,
    )


def make_plan(recipe: Recipe, gpus: int, shape: StepShape, cost: Bytes) -> Plan:
    """Put together what `step_bytes` found."""
    storage, stage = _storage(recipe), recipe.engine.zero_stage
    shards = gpus if stage else 1
    trained, gradients = cost["trained"] * FLOAT32, cost["gradients"]
    offloaded = recipe.engine.offload_optimizer
    parts: dict[str, float] = {}
    for key, count in cost.items():
        kind, _, name = key.partition(" ")
        if kind == "trained" and name:
            parts[f"{name}, trained"] = count * FLOAT32 / (gpus if stage == 3 else 1)
        elif kind == "frozen":
            parts[f"{name}, frozen"] = count * storage
    flow = recipe.algorithm.flow
    averages = (recipe.optim.ema is not None) + (flow is not None and flow.old_policy is not None)
    parts |= {
        "KL reference": cost.get("reference", 0.0) * storage,
        "optimizer state": 0.0 if offloaded else cost["trained"] * MOMENTS / shards,
        "ZeRO's own float32 copy": trained / gpus if stage and not offloaded else 0.0,
        "moving averages": trained * averages,
    }
    activations = cost["update"] - (gradients if shape.later else 0.0)
    held = gradients
    if stage is not None and stage >= 2:
        held = gradients / gpus
        activations += 2 * min(BUCKET * FLOAT32, 2 * trained)
    elif gpus > 1 and not stage:
        parts["gradients"], held = gradients, 0.0  # in buckets that stay
    # on a GPU all parameters are updated at once and need one more tensor each, on a CPU one after the other
    update = 2 * cost["largest"] * FLOAT32 if recipe.engine.device == "cpu" else trained / shards
    if stage:
        update += trained / gpus  # the averaged gradients of this rank's share
    whole = trained if stage == 3 else 0.0  # gathered while the sampler copies them
    phases = {
        # with the sampler's copy of the weights, which is released before the update
        **drawing_phases(cost, whole),
        SCORING: cost["scoring"],
        UPDATE: activations + (held if shape.later else 0.0),
        OPTIMIZER: held + update,
    }
    waiting = cost["waiting"] * storage if recipe.engine.offload_frozen else 0.0
    return Plan(gpus, {name: value for name, value in parts.items() if value}, phases, waiting=waiting)


def drawing_phases(cost: Bytes, whole: float) -> dict[str, float]:
    """Return what drawing takes, the sampler's copy of the weights included; `whole` bytes while it is made."""
    sampler = cost["sampler"]
    return {
        COPYING: cost["laying_out"] + whole,
        SAMPLING: sampler + cost["sampling"],
        **({READING: sampler + cost["reading"]} if "reading" in cost else {}),
        DRAWING: sampler + cost["drawing"] + cost["hidden"],
    }


def actor_plan(recipe: Recipe, cost: Bytes) -> Plan:
    """Put together what the GPU of a rollout actor holds: all weights, and what drawing takes."""
    parts: dict[str, float] = {}
    for key, count in cost.items():
        kind, _, name = key.partition(" ")
        if name and kind in ("trained", "frozen") and count:
            parts[f"{name}, {kind}"] = count * (FLOAT32 if kind == "trained" else _storage(recipe))
    each = recipe.rollout.num_gpus or 1.0
    crowd = max(1, math.floor(1 / each))  # actors that share a GPU
    parts = {name: crowd * size for name, size in parts.items()}
    phases = {name: crowd * size for name, size in drawing_phases(cost, 0.0).items()}
    return Plan(max(1, actor_gpus(recipe)), parts, phases, draws=True)


def _storage(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bf16" else FLOAT32


def lighter(recipe: Recipe, plan: Plan) -> dict[str, object] | None:
    """Return settings of a recipe that take less memory at the moment when a plan takes most, and change nothing but
    time and rounding: the cheapest that are still to be had; None when there are none."""
    rollout, engine = recipe.rollout, recipe.engine
    asked = math.ceil(rollout.prompts_per_step / (rollout.workers or plan.gpus))
    sampled = min(rollout.sample_chunk or asked, asked)
    drawn = min(rollout.decode_chunk or sampled, sampled)
    evaluated = 0 if plan.draws else max(recipe.eval.batch_size, recipe.run.sample_prompts)
    if plan.draws or not rollout.workers:
        if plan.busiest in (SAMPLING, READING) and sampled > 1:
            return {"rollout.sample_chunk": math.ceil(sampled / 2)}
        if plan.busiest == DRAWING and drawn > 1 and drawn * rollout.group_size * rollout.decodes > evaluated:
            return {"rollout.decode_chunk": math.ceil(drawn / 2)}
    if plan.busiest in (SAMPLING, READING, DRAWING) and evaluated and recipe.eval.batch_size > 1:
        return {"eval.batch_size": recipe.eval.batch_size // 2}
    if plan.busiest in (SCORING, UPDATE) and engine.micro_batch_size > 1:
        return {"engine.micro_batch_size": engine.micro_batch_size // 2}
    if plan.busiest in (SCORING, UPDATE) and not engine.activation_checkpointing:
        return {"engine.activation_checkpointing": True}
    if recipe.model.dtype == "fp32" and engine.precision == "bf16":
        return {"model.dtype": "bf16"}
    if plan.draws:
        return None
    if plan.busiest in (UPDATE, OPTIMIZER) and not engine.offload_frozen:
        return {"engine.offload_frozen": True}
    stage, flow = engine.zero_stage or 0, recipe.algorithm.flow
    averaged = recipe.optim.ema is not None or (flow is not None and flow.old_policy is not None)
    if plan.gpus > 1 and stage < (3 if flow is None else 2) and not averaged:
        return {"engine.name": "deepspeed", "engine.zero_stage": stage + 1}
    if stage and not engine.offload_optimizer:
        return {"engine.offload_optimizer": True}
    return None


def table(plans: Sequence[Plan], gpu_memory: float | None) -> str:
    """Lay out GiB by part and moment, a column for each number of GPUs."""
    small = max(plan.peak for plan in plans) < GIB
    unit, name = (2**20, "MiB") if small else (GIB, "GiB")
    rows = [[f"{name} per GPU", *(plan.title for plan in plans)]]

    def add(name: str, values: Sequence[float], marks: Sequence[str] = ()) -> None:
        shown = [f"{value / unit:.1f}" for value in values]
        rows.append([name, *(a + b for a, b in zip(shown, marks or [""] * len(shown), strict=True))])

    for name in dict.fromkeys(name for plan in plans for name in plan.parts):
        add(name, [plan.parts.get(name, 0.0) for plan in plans])
    for name in plans[0].phases:  # of training, which has all
        marks = ["*" if plan.busiest == name else "" for plan in plans]
        add(f"  {name}", [plan.phases.get(name, 0.0) for plan in plans], marks)
    if any(plan.waiting for plan in plans):
        add("  of parts, in host memory in these two", [-plan.waiting for plan in plans])
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
