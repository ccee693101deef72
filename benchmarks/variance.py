"""The gain of taking the decoder's luck out of the tokens' advantage, at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.measuring import Report, interleaved
from imagerl.rl.rollout.engine import RolloutEngine, reward_request, to_uint8, with_pictures
from imagerl.rl.types import Prompt, RewardRequest, RewardScores

DECODES = (1, 2, 4)
RESAMPLES = 2000


def crossed_split(rewards: np.ndarray) -> dict[str, np.ndarray]:
    """Split the variance of rewards [P, G, M] within each prompt, where the m-th picture of every sequence of a
    prompt began from the same noise: unbiased estimates [P] of a two-way analysis of variance.

    `tokens` is the variance of a sequence's expected reward, `noise` that of what a noise does to all sequences alike,
    and `both` that of what it does to one and not to the other. Single estimates can be negative; means over prompts
    are what counts.

    With noise of its own each picture's luck is noise + both; with the same noise for a group, what is common to it
    falls out of every advantage and both is left.
    """
    _, group, decodes = rewards.shape
    rows, columns = rewards.mean(axis=2), rewards.mean(axis=1)  # [P, G], [P, M]
    rest = rewards - rows[:, :, None] - columns[:, None] + rewards.mean(axis=(1, 2))[:, None, None]
    both = np.square(rest).sum(axis=(1, 2)) / ((group - 1) * (decodes - 1))
    return {
        "tokens": rows.var(axis=1, ddof=1) - both / decodes,
        "noise": columns.var(axis=1, ddof=1) - both / group,
        "both": both,
    }


def measure(
    policy: Any,
    rollout: RolloutEngine,
    score: Callable[[RewardRequest], RewardScores],
    prompts: Sequence[Prompt],
    group_size: int,
    repeats: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return rewards [P, G, M] of token sequences, the m-th picture of all of a prompt from one noise, and the seconds
    that each part of a step takes: `tokens` and `update` for a sequence, `decode` and `score` for a picture.

    `policy` is a `models.blip3o_next.policy.ImagePolicy`, whose gradients are left behind; `rollout` has shared
    noise."""
    sampling = rollout.sampling
    totals = [
        score(reward_request(groups)).totals
        for groups in rollout.generate(prompts, group_size, "variance", sample_chunk=4)
    ]
    rewards = np.concatenate(totals).reshape(-1, group_size, sampling.decodes)

    some = [with_pictures(prompt) for prompt in prompts[:4]]
    given = policy.encode(some)
    uniforms = rollout.uniforms("variance", some, group_size)
    every = rollout.noise("variance", some, group_size)
    assert every is not None
    noise = every[:: sampling.decodes]
    trajectory = policy.sample_tokens(given, uniforms, sampling)
    pictures = policy.decode(given, trajectory, noise, sampling)
    (groups,) = rollout.generate(some, group_size, "variance")
    request = reward_request(groups)
    request.images[:: sampling.decodes] = to_uint8(pictures)

    def update() -> None:
        policy.trainable(given, trajectory.tokens, sampling).logprobs.mean().backward()

    samples = len(some) * group_size
    seconds = interleaved(
        {
            "tokens": lambda: policy.sample_tokens(given, uniforms, sampling),
            "decode": lambda: policy.decode(given, trajectory, noise, sampling),
            "score": lambda: score(request),
            "update": update,
        },
        repeats,
        lambda: None,
    )
    per = {"score": samples * sampling.decodes}
    return rewards, {name: value / per.get(name, samples) for name, value in seconds.items()}


def gains(rewards: np.ndarray, seconds: Mapping[str, float], seed: int = 0) -> Report:
    """Return what each way of drawing buys over a picture a sequence with noise of its own.

    A sequence's advantage is its merit, of variance `tokens`, and luck. The squared signal-to-noise ratio of a
    gradient that is a sum over sequences grows with the merit's part of the advantage's variance, `signal/…`, and with
    the number of sequences, which at equal cost falls with the seconds that one takes. `gain/…` is their product over
    that of `own_1`: 1.2 reaches the same gradient in 1 / 1.2 of the time. `…_low` and `…_high` bound it, a 95 %
    bootstrap over prompts; the seconds are taken as they are.

    Prompts with a missing reward are left out.
    """
    rewards = rewards[np.isfinite(rewards).all(axis=(1, 2))]
    split = crossed_split(rewards)
    means = {name: float(values.mean()) for name, values in split.items()}
    report = {f"variance/{name}": value for name, value in means.items()}
    report |= {f"time/{name}_ms": 1000 * value for name, value in seconds.items()}
    choice = np.random.default_rng(seed).integers(len(rewards), size=(RESAMPLES, len(rewards)))
    drawn = {name: values[choice].mean(axis=1) for name, values in split.items()}
    cost = {
        m: seconds["tokens"] + seconds["update"] + m * (seconds["decode"] + seconds["score"]) for m in DECODES
    }
    for decodes in DECODES:
        for noise in ("own", "shared"):
            name = f"{noise}_{decodes}"
            value = _signal(means, noise, decodes)
            cheaper = cost[1] / cost[decodes]
            report[f"signal/{name}"] = float(value)
            report[f"gain/{name}"] = float(value / _signal(means, "own", 1) * cheaper)
            spread = _signal(drawn, noise, decodes) / _signal(drawn, "own", 1) * cheaper
            report[f"gain/{name}_low"], report[f"gain/{name}_high"] = map(
                float, np.quantile(spread, [0.025, 0.975])
            )
    return report


def _signal(split: Mapping[str, Any], noise: str, decodes: int) -> Any:
    """Return the merit's part of the variance of a sequence's reward within its group."""
    luck = split["both"] + (split["noise"] if noise == "own" else 0.0)
    return split["tokens"] / (split["tokens"] + luck / decodes)
