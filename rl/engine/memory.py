"""The memory that a training step takes, found by running its own code on tensors without content.

Everything that a step does to a policy is done here to fake tensors, which have shapes and storages but no numbers,
while a dispatch mode adds up the storages that are alive. Layers are all alike, so two shallow models give the cost
of a layer and of the rest, and any depth follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from imagerl.models.base import Policy
from imagerl.rl.config.engine import LoraConfig
from imagerl.rl.types import SamplingParams, TokenScores

Bytes = dict[str, float]
SHALLOW, DEEPER = 2, 4  # layers of the models that are run


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work that a process does at once in a training step."""

    sampled: int  # prompts whose tokens are sampled together
    group: int
    pictures: int  # drawn together
    prompt_tokens: int
    image_tokens: int
    micro_batch: int  # samples of a forward and backward pass
    share: int  # samples that read one prompt in the update; 1: each reads its own
    guidance: float
    token_guidance: float
    noise: tuple[int, int, int] | None  # of a picture
    sampler_dtype: torch.dtype
    storage: torch.dtype  # of frozen weights
    bf16: bool  # autocast
    recompute: bool = False  # layers, in the backward pass
    edits: int = 0  # pictures to edit that are read together; 0: prompts are captions

    @property
    def samples(self) -> int:
        """Token sequences sampled together."""
        return self.sampled * self.group

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations within have made and that are still alive, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return False  # asked of contents, such as whether a mask has padding
        self._count((args, kwargs), new=False)  # weights, which were there before
        result = function(*args, **(kwargs or {}))
        self._count(result, new=True)
        return result

    def _count(self, values: Any, new: bool) -> None:
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


def at_depth(measure: Callable[[int], Bytes], layers: int) -> Bytes:
    """Return `measure(layers)` itself for few layers, else the line through two shallow models."""
    if layers <= DEEPER:
        return measure(layers)
    low, high = measure(SHALLOW), measure(DEEPER)
    steps = (layers - SHALLOW) / (DEEPER - SHALLOW)
    return {name: low[name] + steps * (high[name] - low[name]) for name in low}


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


def token_half_bytes(
    policy: Policy, shape: StepShape, lora: LoraConfig | None = None, freeze: Sequence[str] = ()
) -> Bytes:
    """Measure the half that writes tokens of a policy without weights, which is used up: parameters by kind (counted),
    and bytes beyond its weights in each phase."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    half = policy.trainable
    weights = sum(p.numel() for p in half.parameters())
    half.requires_grad_(True).eval()
    if shape.recompute:
        policy.recompute()
    if lora is not None:  # here, where PEFT may still move modules about
        policy.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
        policy.freeze_reference()
    policy.freeze(freeze)
    policy.sampler_dtype = shape.sampler_dtype
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(half, shape.storage)
        with torch.no_grad(), LiveBytes() as memory:
            _scored(policy, shape, policy.reference_scores if lora else half)
        for parameter in half.parameters():
            if parameter.requires_grad:  # what trains is float32, whatever its storage; see `Engine.prepare`
                parameter.data = parameter.data.float()
        trained = {name: p.numel() for name, p in half.named_parameters() if p.requires_grad}
        own = sum(size for name, size in trained.items() if ".lora_" not in name)
        counts = {
            "weights": weights,
            "trained": sum(trained.values()),
            "trained_base": own,
            "largest": max(trained.values()),
        }
        costs = {"reference": memory.peak, **_sampling(policy, shape), **_update(policy, shape)}
        return {name: float(value) for name, value in (counts | costs).items()}


def decoder_bytes(policy: Policy, shape: StepShape) -> Bytes:
    """Measure all other parts likewise: their parameters as "part <name>", and bytes beyond weights while pictures are
    drawn, and those to edit are read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sampling = SamplingParams(guidance=shape.guidance, flow_steps=2)
    policy.sampler_dtype = shape.sampler_dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for part in policy.parts().values():
            without_content(part, shape.storage)
        costs: dict[str, float] = {}
        if shape.edits:
            with LiveBytes() as memory:
                policy.blank(shape.edits, 1, 1, edits=True)
            costs["reading"] = memory.peak
        prompts, trajectory = policy.blank(shape.pictures, 1, shape.pictures, bool(shape.edits))
        noise = None if shape.noise is None else torch.empty(shape.pictures, *shape.noise)
        with LiveBytes() as memory, shape.autocast():
            policy.decode(prompts, trajectory, noise, sampling)
    parts = {f"part {name}": part for name, part in list(policy.parts().items())[1:]}
    counts = {name: float(sum(p.numel() for p in part.parameters())) for name, part in parts.items()}
    return {**counts, **costs, "drawing": float(memory.peak)}


def _sampling(policy: Policy, shape: StepShape) -> dict[str, int]:
    """Measure the sampler's own copy of the weights, and what drawing a chunk of samples takes beside it."""
    steps = min(4, shape.image_tokens)
    with torch.no_grad(), LiveBytes() as memory:
        policy.refresh_sampler()
        copies, laying_out = memory.live, memory.peak
        memory.restart()
        prompts, _ = policy.blank(shape.sampled, shape.prompt_tokens, 0)
        uniforms = torch.empty(shape.samples, steps, dtype=torch.float64)
        policy.sample_tokens(prompts, uniforms, SamplingParams(token_guidance=shape.token_guidance))
    drawing, kept = policy.token_bytes()
    rest = (shape.image_tokens - steps) * shape.samples
    return {
        "sampler": copies,
        "laying_out": laying_out,
        "sampling": memory.peak - copies + rest * drawing,
        "hidden": shape.samples * (shape.image_tokens + 1) * kept,
    }


def _scored(policy: Policy, shape: StepShape, score: Callable[..., TokenScores]) -> TokenScores:
    rows = max(1, shape.micro_batch // shape.share)
    prompts, trajectory = policy.blank(rows, shape.prompt_tokens, shape.micro_batch)
    tokens = trajectory.tokens
    del trajectory  # of which scoring needs no more
    with shape.autocast():
        return score(prompts, tokens, SamplingParams(token_guidance=shape.token_guidance))


def _update(policy: Policy, shape: StepShape) -> dict[str, int]:
    """Measure the peak of forward and backward of a step's first microbatch and of a later one, when gradients are
    there."""
    peaks = {}
    with LiveBytes() as memory:
        for name in ("update_first", "update"):
            _scored(policy, shape, policy.trainable).logprobs.sum().backward()
            peaks[name] = memory.peak
            memory.restart()
        return peaks | {"gradients": memory.live}
