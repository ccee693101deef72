"""Speed, measured against something in the same run: ratios and shares carry over to other machines, seconds do not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics, to_json
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.rollout.engine import RolloutEngine, to_uint8
from imagerl.rl.types import Prompt, repeat

Report = dict[str, float]
PHASES = ("rollout", "reference", "reward_wait", "update", "other")


def interleaved(
    tasks: Mapping[str, Callable[[], Any]], repeats: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Return median seconds of each task. All tasks run once to warm up, then take turns, so that a machine which slows
    down slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(repeats + 1):
        for name, task in tasks.items():
            synchronise()
            start = time.perf_counter()
            task()
            synchronise()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory_mb() -> float:
    """Return the most memory that this process has held: on the GPU where one is in use, else resident in RAM."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def operator_shares(task: Callable[[], Any], count: int = 8) -> Report:
    """Measure where a task's time goes: `share/op/<operator>` of the operators that take most, and `share/op/other`."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_initialized()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        task()
    times = {
        event.key.removeprefix("aten::"): float(
            event.self_device_time_total if on_gpu else event.self_cpu_time_total
        )
        for event in profiled.key_averages()
    }
    total = max(sum(times.values()), 1e-9)
    largest = sorted(times, key=lambda name: -times[name])[:count]
    shares = {f"share/op/{name}": times[name] / total for name in largest}
    return shares | {"share/op/other": 1 - sum(shares.values())}


def bench_rollout(
    rollout: RolloutEngine, prompts: Sequence[Prompt], group_size: int = 16, repeats: int = 5
) -> Report:
    """Sample and draw a batch, beside transformers' `generate` on the same weights, prompts and lengths.

    `generate` returns tokens alone. `and_scoring` adds the forward pass that others then need for log-probs and
    hidden states, which our sampler returns anyway. The rollout is of a `models.blip3o_next.policy.ImagePolicy`."""
    policy: Any = rollout.policy
    sampling, batch = rollout.sampling, len(prompts) * group_size
    rows = policy.encode(prompts)
    repeated = repeat(rows, group_size)
    uniforms = rollout.uniforms("bench", prompts, group_size)
    noise = rollout.noise("bench", prompts, group_size)
    assert noise is not None
    noise = noise.to(policy.device)
    lm, decoder = policy.trainable.lm, policy.decoder

    def sample() -> Any:
        policy.refresh_sampler()  # the weights are laid out anew after every update: part of the price
        return policy.sample_tokens(rows, uniforms, sampling)

    def generate() -> Tensor:
        return lm.generate(
            input_ids=repeated["ids"],
            attention_mask=repeated["mask"].long(),
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=policy.num_actions,
            min_new_tokens=policy.num_actions,
            pad_token_id=0,
        )

    trajectory = sample()
    with torch.no_grad():
        hidden = trajectory.states["hidden"]
        latents = decoder.latents(hidden, noise, sampling.guidance, sampling.flow_steps)
        pictures = decoder.draw(latents)
        seconds = interleaved(
            {
                "sample": sample,
                "generate": generate,
                "scoring": lambda: policy.trainable(repeated, trajectory.tokens, sampling),
                "flow": lambda: decoder.latents(hidden, noise, sampling.guidance, sampling.flow_steps),
                "vae": lambda: decoder.draw(latents),
                "random": lambda: (
                    rollout.uniforms("bench", prompts, group_size),
                    rollout.noise("bench", prompts, group_size),
                ),
                "other": lambda: (policy.encode(prompts), to_uint8(pictures)),
            },
            repeats,
            torch.cuda.synchronize if policy.device.type == "cuda" else lambda: None,
        )
        operators = operator_shares(sample)
    parts = ("sample", "flow", "vae", "random", "other")
    total = sum(seconds[part] for part in parts)
    tokens = batch * policy.num_actions
    return {
        "ratio/over_generate": seconds["generate"] / seconds["sample"],
        "ratio/over_generate_and_scoring": (seconds["generate"] + seconds["scoring"]) / seconds["sample"],
        "sampled_tokens_per_s": tokens / seconds["sample"],
        "rollout_tokens_per_s": tokens / total,
        "images_per_s": batch / total,
        **{f"share/{part}": seconds[part] / total for part in parts},
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "peak_memory_mb": peak_memory_mb(),
        **operators,
    }


def bench_step(run_folder: Path, tokens_per_step: int) -> Report:
    """Return medians over the training steps that a run has logged, the first one left out as warm-up.

    `share/reward_wait` is reward time that nothing else hides."""
    steps = [row for row in read_metrics(run_folder) if "time/step_s" in row][1:]
    if not steps:
        raise ImageRLError(f"{run_folder} has logged fewer than 2 training steps; let it run longer")

    def median(key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in steps)

    return {
        "train_tokens_per_s": tokens_per_step / median("time/update_s"),
        "step_tokens_per_s": tokens_per_step / median("time/step_s"),
        "images_per_s": median("images_per_s"),
        **{f"share/{phase}": median(f"share/{phase}") for phase in PHASES},
        **{f"time/{phase}_s": median(f"time/{phase}_s") for phase in ("step", *PHASES[:-1])},
        "peak_memory_mb": peak_memory_mb(),
    }


def table(report: Report) -> str:
    """Write two aligned columns; shares in per cent."""
    width = max(map(len, report))

    def shown(name: str, value: float) -> str:
        if name.startswith("share/"):
            return f"{100 * value:.1f} %"
        return f"{value:.2f}x" if name.startswith("ratio/") else f"{value:.4g}"

    return "\n".join(f"{name:<{width}}  {shown(name, value):>9}" for name, value in report.items())


def show(report: Report, file: Path | None = None) -> None:
    """Print a report, and write it as JSON where a file is given."""
    print(table(report))
    if file is not None:
        write_atomic(file, to_json(report, indent=1) + "\n")
