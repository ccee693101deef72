"""The memory that a training step takes, found by running its own code on tensors without content.

Everything that a step does to a policy is done here to fake tensors, which have shapes and storages but no numbers,
while a dispatch mode adds up the storages that are alive. All layers are there: shallow models would not tell, because
what is largest in them (the head's logits, say) is not what is largest in deep ones.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from imagerl.models.base import Policy
from imagerl.rl.config.train import Recipe
from imagerl.rl.rollout.engine import training_sampling
from imagerl.rl.training.flow_half import window_at
from imagerl.rl.training.halves import FLOW, TOKENS, trained_halves, trained_module
from imagerl.rl.types import TokenScores, repeat

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Bytes = dict[str, float]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work that a process does at once in a training step."""

    sampled: int  # prompts whose tokens are sampled together
    pictures: int  # drawn together
    prompt_tokens: int
    image_tokens: int
    micro_batch: int  # token sequences of a forward and backward pass
    later: bool  # passes before it have left gradients
    noise: tuple[int, int, int] | None  # of a picture
    edits: int = 0  # pictures to edit that are read together; 0: prompts are captions


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations within have made and that are still alive, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # most calls, and none has a storage of its own
            return function(*args)
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return False  # asked of contents, such as whether a mask has padding
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            args = (args[0], list(_without_masks(args[1])), *args[2:])
        self._count((args, kwargs), new=False)  # weights, which were there before
        result = function(*args, **(kwargs or {}))
        self._count(result, new=True)
        return result

    def _count(self, values: object, new: bool) -> None:
        for value in tree_flatten(values)[0]:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes() if new else 0
                self.live += self._sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _without_masks(indices: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Let masks among the indices of a tensor choose all that they can: which entries are meant is not known."""
    for index in indices:
        if index is None or index.dtype is not torch.bool:
            yield index
        else:
            yield from [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()


def without_content(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module fake parameters of `dtype`, shared where they were; call under FakeTensorMode."""
    fakes: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = fakes.get(id(parameter))
                if fake is None:
                    fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    fakes[id(parameter)] = fake
                part._parameters[name] = fake


def step_bytes(
    new_policy: Callable[[], Policy], recipe: Recipe, shape: StepShape, known: dict[StepShape, Bytes]
) -> Bytes:
    """Measure a step of policies without weights, which are used up: the numbers in each of their parts as "frozen
    <name>" and "trained <name>", and the bytes beyond weights and optimizer at each moment of the step. `known` is
    what was measured before for the same recipe: with other numbers of processes drawing alone may differ."""
    draws = replace(shape, micro_batch=0, later=False)
    updates = replace(shape, sampled=0, pictures=0, edits=min(shape.edits, 1))
    if draws not in known:
        known[draws] = _drawing_bytes(new_policy(), recipe, draws)
    if updates not in known:
        known[updates] = _update_bytes(new_policy(), recipe, updates)
    return known[draws] | known[updates]


def _update_bytes(policy: Policy, recipe: Recipe, shape: StepShape) -> Bytes:
    flow, reference = recipe.algorithm.flow, _has_reference(recipe)
    counts: Bytes = {}
    if recipe.model.lora is None and reference:
        counts["reference"] = _count(policy.trainable)
    if flow is not None and policy.flow is not None and flow.kl_coef and flow.lora is None:
        counts["reference"] = counts.get("reference", 0) + _count(policy.flow.trainable)
    with _without_weights(policy, recipe) as module:
        counts["scoring"] = _scoring(policy, recipe, shape)
        trained = _trained(module)
        known = set(map(id, trained))
        for name, part in policy.parts().items():
            counts[f"frozen {name}"] = sum(p.numel() for p in part.parameters() if id(p) not in known)
            counts[f"trained {name}"] = sum(p.numel() for p in part.parameters() if id(p) in known)
        used = set(map(id, module.parameters()))
        counts["waiting"] = counts.get("reference", 0) + sum(
            p.numel() for part in policy.parts().values() for p in part.parameters() if id(p) not in used
        )
        counts["trained"] = sum(p.numel() for p in trained)
        counts["largest"] = max(p.numel() for p in trained)
        return counts | _update(policy, recipe, shape, module, trained)


def _drawing_bytes(policy: Policy, recipe: Recipe, shape: StepShape) -> Bytes:
    with _without_weights(policy, recipe) as module:
        _trained(module)
        return _sampling(policy, recipe, shape) | _drawing(policy, recipe, shape)


@contextmanager
def _without_weights(policy: Policy, recipe: Recipe) -> Iterator[nn.Module]:
    """Make what a recipe trains of a policy, and lay out its parameters without content."""
    module = trained_module(policy, recipe)
    if recipe.model.lora and _has_reference(recipe):  # here, where PEFT may still move modules about
        policy.freeze_reference()
    policy.sampler_dtype = TYPES[recipe.engine.precision]
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # torch itself does so, where it copies modules
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for part in policy.parts().values():
            without_content(part, TYPES[recipe.model.dtype])
        yield module


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train, in float32 from here on, whatever their storage; see `Engine.prepare`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def _has_reference(recipe: Recipe) -> bool:
    """Tell whether a frozen copy of the half that writes tokens is kept; see `halves.freeze_references`."""
    return TOKENS in trained_halves(recipe) and (recipe.algorithm.needs_reference or recipe.eval.kl)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _autocast(recipe: Recipe) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.engine.precision == "bf16")


def _sampling(policy: Policy, recipe: Recipe, shape: StepShape) -> Bytes:
    """Measure the sampler's own copy of the weights, and what drawing a chunk of samples takes beside it."""
    steps, samples = min(4, shape.image_tokens), shape.sampled * recipe.rollout.group_size
    with torch.no_grad(), LiveBytes() as memory:
        policy.refresh_sampler()
        copies, laying_out = memory.live, memory.peak
        memory.restart()
        prompts, _ = policy.blank(shape.sampled, shape.prompt_tokens, 0)
        uniforms = torch.empty(samples, steps, dtype=torch.float64)
        policy.sample_tokens(prompts, uniforms, training_sampling(recipe))
    policy.release_sampler()
    drawing, kept = policy.token_bytes()
    rest = (shape.image_tokens - steps) * samples
    return {
        "sampler": copies,
        "laying_out": laying_out,
        "sampling": memory.peak - copies + rest * drawing,
        "hidden": samples * (shape.image_tokens + 1) * kept,
    }


def _drawing(policy: Policy, recipe: Recipe, shape: StepShape) -> Bytes:
    """Measure the drawing of some pictures, and the reading of those to edit."""
    costs: Bytes = {}
    if shape.edits:
        with LiveBytes() as memory, torch.no_grad():
            policy.blank(shape.edits, 1, 1, edits=True)
        costs["reading"] = memory.peak
    sampling = replace(training_sampling(recipe), guidance=_guidance(recipe), flow_steps=2)
    with torch.no_grad():
        prompts, trajectory = policy.blank(shape.pictures, 1, shape.pictures, bool(shape.edits))
    noise = None if shape.noise is None else torch.empty(shape.pictures, *shape.noise)
    with LiveBytes() as memory, _autocast(recipe), torch.no_grad():
        policy.decode(prompts, trajectory, noise, sampling)
    return costs | {"drawing": memory.peak}


def _guidance(recipe: Recipe) -> float:
    flow = recipe.algorithm.flow
    return recipe.rollout.guidance if flow is None or flow.guidance is None else flow.guidance


def _points(recipe: Recipe) -> int:
    """Count the points of a picture where the decoder is asked for a velocity with a gradient."""
    flow = recipe.algorithm.flow
    assert flow is not None
    if flow.is_matching:
        return flow.points
    with unset_fake_temporarily():  # a random window is drawn
        return len(window_at(flow, flow.steps or recipe.rollout.flow_steps, 0, recipe.run.seed))


@torch.no_grad()
def _arguments(policy: Policy, recipe: Recipe, shape: StepShape) -> list[tuple[Any, ...]]:
    """Return the arguments of a microbatch for each trained half, as `Half.arguments` makes them."""
    group, engine = recipe.rollout.group_size, recipe.engine
    share = group if engine.micro_batch_size % group == 0 and not engine.activation_checkpointing else 1
    rows = max(1, shape.micro_batch // share)
    edits = shape.edits > 0 and FLOW in trained_halves(recipe)  # only a decoder sees what is edited
    prompts, trajectory = policy.blank(rows, shape.prompt_tokens, shape.micro_batch, edits)
    found: dict[str, tuple[Any, ...]] = {TOKENS: (prompts, trajectory.tokens, training_sampling(recipe))}
    if policy.flow is not None and shape.noise is not None:
        condition = repeat(policy.flow.condition(prompts, trajectory), recipe.rollout.decodes)
        points = shape.micro_batch * recipe.rollout.decodes, _points(recipe)
        found[FLOW] = (condition, torch.empty(*points, *shape.noise), torch.empty(points), _guidance(recipe))
    return [found[name] for name in trained_halves(recipe)]


def _scoring(policy: Policy, recipe: Recipe, shape: StepShape) -> float:
    """Measure the scoring of a microbatch by the references, of which one works after the other."""
    halves, flow = trained_halves(recipe), recipe.algorithm.flow
    arguments = dict(zip(halves, _arguments(policy, recipe, shape), strict=True))
    peaks = [0.0]
    if _has_reference(recipe):
        score = policy.reference_scores if recipe.model.lora else policy.trainable
        peaks.append(_peak(recipe, lambda: score(*arguments[TOKENS])))
    if flow is not None and policy.flow is not None and flow.kl_coef:
        velocity = policy.flow.reference_velocity if flow.lora else policy.flow.trainable
        peaks.append(_peak(recipe, lambda: velocity(*arguments[FLOW])))
    return max(peaks)


def _peak(recipe: Recipe, score: Callable[[], object]) -> float:
    with torch.no_grad(), LiveBytes() as memory, _autocast(recipe):
        score()
    return float(memory.peak)


def _update(
    policy: Policy, recipe: Recipe, shape: StepShape, module: nn.Module, trained: Sequence[nn.Parameter]
) -> Bytes:
    """Measure the peak of a microbatch's forward and backward, gradients included, and these alone."""
    with LiveBytes() as memory:
        arguments = _arguments(policy, recipe, shape)
        if shape.later:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        memory.restart()  # what is edited was read before
        with _autocast(recipe):
            scored = [module(*arguments[0])] if len(arguments) == 1 else module(*arguments)
        sums = [(one.logprobs if isinstance(one, TokenScores) else one).sum() for one in scored]
        del scored
        torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
        del sums, arguments
        return {"update": float(memory.peak), "gradients": float(memory.live)}
