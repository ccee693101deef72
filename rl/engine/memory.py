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
    """Give a module fake parameters of `dtype`; call under FakeTensorMode. Ties between parameters are lost."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)


def language_model_bytes(
    policy: Any, shape: StepShape, lora: Mapping[str, Any] | None = None, freeze: Sequence[str] = ()
) -> Bytes:
    """Measure the autoregressive half of a policy without weights: parameters by kind (counted), and bytes beyond
    its weights in each phase. `policy` is a `models.blip3o_next.policy.ImagePolicy`, which is used up."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ar, lm = policy.trainable, policy.trainable.lm
    weights = sum(p.numel() for p in ar.parameters())
    ar.requires_grad_(True).eval()
    if shape.recompute:
        policy.recompute()
    if lora is not None:
        policy.add_lora(**lora)  # here, where PEFT may still move modules about
    policy.freeze(freeze)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(ar, shape.storage)
        if lm.config.tie_word_embeddings:
            lm.tie_weights()
        with ar.base_weights():
            reference = _reference(ar, shape)
        for parameter in ar.parameters():
            if parameter.requires_grad:  # what trains is float32, whatever its storage; see `Engine.prepare`
                parameter.data = parameter.data.float()
        trained = {name: p.numel() for name, p in ar.named_parameters() if p.requires_grad}
        own = sum(size for name, size in trained.items() if ".lora_" not in name)
        counts = {
            "weights": weights,
            "trained": sum(trained.values()),
            "trained_base": own,
            "largest": max(trained.values()),
        }
        costs = {"reference": reference, **_sampling(policy, shape), **_update(ar, shape)}
        return {name: float(value) for name, value in (counts | costs).items()}


def decoder_bytes(policy: Any, shape: StepShape) -> Bytes:
    """Measure the decoder likewise: parameters, and bytes beyond weights while latents are integrated and drawn."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    decoder = policy.decoder
    width = policy.trainable.lm.config.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        without_content(decoder, shape.storage)
        hidden = torch.empty(shape.pictures, shape.image_tokens + 1, width, dtype=shape.sampler_dtype)
        noise = torch.empty(shape.pictures, *policy.latent_shape)
        reading = 0
        if shape.edits:
            shown = torch.empty(shape.edits, 3, *decoder.picture_size)
            with LiveBytes() as memory:
                decoder.encode(shown)
            reading = memory.peak + shown.untyped_storage().nbytes()
        reference = torch.empty_like(noise) if shape.edits else None
        with LiveBytes() as memory, shape.autocast():
            latents = decoder.latents(hidden, noise, shape.guidance, 2, reference)
            integrating = memory.peak
            memory.restart()
            decoder.draw(latents)
    vae = sum(p.numel() for p in decoder.vae.parameters())
    others = sum(p.numel() for p in decoder.parameters()) - vae
    costs = {"vae": vae, "decoder": others, "integrating": integrating, "drawing": memory.peak}
    costs |= {"reading": reading} if shape.edits else {}
    return {name: float(value) for name, value in costs.items()}


def _sampling(policy: Any, shape: StepShape) -> dict[str, int]:
    """Measure the sampler's own copy of the weights, and what drawing a chunk of samples takes beside it."""
    steps = min(4, shape.image_tokens)
    policy.sampler_dtype = shape.sampler_dtype
    with torch.no_grad(), LiveBytes() as memory:
        policy.refresh_sampler()
        copies, laying_out = memory.live, memory.peak
        memory.restart()
        ids = torch.empty(shape.sampled, shape.prompt_tokens, dtype=torch.int64)
        mask = torch.empty(shape.sampled, shape.prompt_tokens, dtype=torch.bool)
        uniforms = torch.empty(shape.samples, steps, dtype=torch.float64)
        policy.sample_tokens({"ids": ids, "mask": mask}, uniforms, SamplingParams())
    config = policy.trainable.lm.config
    width = shape.sampler_dtype.itemsize
    keys_values = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * width
    hidden = 2 * config.hidden_size * width  # a list while drawing, stacked at its end
    rest = (shape.image_tokens - steps) * shape.samples
    return {
        "sampler": copies,
        "laying_out": laying_out,
        "cache": keys_values * shape.samples * shape.image_tokens,
        "sampling": memory.peak - copies + rest * (keys_values + hidden),
        "hidden": shape.samples * (shape.image_tokens + 1) * config.hidden_size * width,
    }


def _scored(ar: nn.Module, shape: StepShape) -> TokenScores:
    rows = max(1, shape.micro_batch // shape.share)
    ids = torch.empty(rows, shape.prompt_tokens, dtype=torch.int64)
    mask = torch.empty(rows, shape.prompt_tokens, dtype=torch.bool)
    tokens = torch.empty(shape.micro_batch, shape.image_tokens, dtype=torch.int64)
    with shape.autocast():
        return ar({"ids": ids, "mask": mask}, tokens, SamplingParams())


def _reference(ar: nn.Module, shape: StepShape) -> int:
    """Measure the peak of scoring a microbatch by weights as they are stored."""
    with torch.no_grad(), LiveBytes() as memory:
        _scored(ar, shape)
    return memory.peak


def _update(ar: nn.Module, shape: StepShape) -> dict[str, int]:
    """Measure the peak of forward and backward of a step's first microbatch and of a later one, when gradients are
    there."""
    peaks = {}
    with LiveBytes() as memory:
        for name in ("update_first", "update"):
            _scored(ar, shape).logprobs.sum().backward()
            peaks[name] = memory.peak
            memory.restart()
        return peaks | {"gradients": memory.live}
