"""Speed and memory of a model of any size with random weights: loading, sampling, drawing, one training update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Report, interleaved, peak_memory_mb
from imagerl.rl.config.engine import EngineConfig, OptimConfig
from imagerl.rl.engine.engine import Engine
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Rows, SamplingParams

GB = 1e9


def require_memory(needed_gb: float, what: str, smaller: str) -> None:
    """Raises ImageRLError unless a GPU with that much memory is here."""
    if not torch.cuda.is_available():
        raise ImageRLError(
            f"{what} needs a GPU with about {needed_gb:.0f} GB and there is none here; {smaller}"
        )
    found = torch.cuda.get_device_properties(0).total_memory / GB
    if found < needed_gb:
        raise ImageRLError(f"{what} needs about {needed_gb:.0f} GB, this GPU has {found:.0f} GB; {smaller}")


def bandwidth(device: torch.device, megabytes: int) -> float:
    """Measure the bytes a second that the device's memory moves: a large copy, read and write counted."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):  # the first is warm-up
        seconds.append(_timed(lambda: target.copy_(source), device))
    return 2 * source.numel() / statistics.median(seconds[1:])


def bytes_per_token(policy: Any) -> int:
    """Count bytes of weights that one decoding step reads, for however many samples: all layers and the image head."""
    layers = policy._sampler.layers
    tensors = [getattr(layer, name) for layer in layers for name in type(layer).__slots__]
    head = policy.trainable.head.numel() * policy.sampler_dtype.itemsize
    return head + sum(t.numel() * t.element_size() for t in tensors if t is not None)


def bench_model(
    policy: Any,
    load: Callable[[], int],
    samples: int = 16,
    micro_batch: int = 4,
    prompt_tokens: int = 64,
    flow_steps: int = 30,
    repeats: int = 3,
) -> Report:
    """Measure a `models.blip3o_next.policy.ImagePolicy` that lies on its device. `load` loads the same model once
    more and returns the bytes read.

    `ratio/of_bandwidth_limit` is the sampler's speed over that of a machine which only reads each weight once a
    step, at the bandwidth measured in the same run: reading keys and values, and all arithmetic, is on top."""
    device = policy.device
    on_gpu = device.type == "cuda"
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        policy.sampler_dtype = torch.bfloat16
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (1, prompt_tokens), generator=numbers).to(device)
    rows = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    uniforms = torch.rand(samples, policy.num_actions, generator=numbers, dtype=torch.float64)
    noise = torch.randn(samples, *policy.latent_shape, generator=numbers).to(device)

    begun = time.perf_counter()
    read = load()
    synchronise()
    loading = time.perf_counter() - begun
    policy.refresh_sampler()
    limit = samples * bandwidth(device, 1024 if on_gpu else 64) / bytes_per_token(policy)
    trajectory = policy.sample_tokens(rows, uniforms, SamplingParams())
    decoder, hidden = policy.decoder, trajectory.states["hidden"]
    latents = decoder.latents(hidden, noise, 2.0, flow_steps)
    seconds = interleaved(
        {
            "layout": policy.refresh_sampler,
            "sample": lambda: policy.sample_tokens(rows, uniforms, SamplingParams()),
            "flow": lambda: decoder.latents(hidden, noise, 2.0, flow_steps),
            "vae": lambda: decoder.draw(latents),
        },
        repeats,
        synchronise,
    )
    rollout_peak = peak_memory_mb()
    update = _update(policy, rows, trajectory.tokens[:micro_batch], repeats, synchronise)
    sampled = samples * policy.num_actions / seconds["sample"]
    return {
        "load_gb_per_s": read / GB / loading,
        "sampled_tokens_per_s": sampled,
        "bandwidth_limit_tokens_per_s": limit,
        "ratio/of_bandwidth_limit": sampled / limit,
        "images_per_s": samples / sum(seconds.values()),
        "train_tokens_per_s": micro_batch * policy.num_actions / update,
        "time/load_s": loading,
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/update_s": update,
        "rollout_peak_memory_mb": rollout_peak,
        "peak_memory_mb": peak_memory_mb(),
    }


def _update(policy: Any, rows: Rows, tokens: Tensor, repeats: int, synchronise: Callable[[], None]) -> float:
    """Return median seconds of forward, backward and optimizer step of one microbatch, full weights."""
    on_gpu = policy.device.type == "cuda"
    engine = Engine(EngineConfig(precision="bf16" if on_gpu else "fp32", device="auto" if on_gpu else "cpu"))
    policy.trainable.requires_grad_(True)
    engine.prepare(policy.trainable, OptimConfig(), repeats + 1)

    def step() -> None:
        with engine.microbatch(last=True):
            with engine.autocast():
                scores = engine.module(rows, tokens, SamplingParams())
            engine.backward(-scores.logprobs.mean())
        engine.step()

    try:
        return interleaved({"update": step}, repeats, synchronise)["update"]
    finally:
        engine.close()


def _timed(task: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
