"""Cost of each algorithm over plain GRPO, on the same tensors: ratios within one run, medians, taken in turns.

Two prices are told apart. `loss` is the loss function and its backward pass to the log-probs alone. `update` adds
what an update of a policy cannot do without, the forward pass that gives these log-probs and the backward pass to the
weights, stood in for by a projection of given size: there the differences between losses drown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import Report, interleaved
from imagerl.rl.algorithms.advantages import AdvantageInputs
from imagerl.rl.algorithms.loading import load_advantages, load_loss, loss_settings
from imagerl.rl.algorithms.losses import entropy_threshold, highest_entropy, loss_denominator, policy_weights
from imagerl.rl.config.algorithm import AlgorithmConfig
from imagerl.rl.config.algorithm_table import ALGORITHMS
from imagerl.rl.types import LossInputs

EXTRAS = {"top_entropy": {"top_entropy": 0.2}, "importance_cap": {"importance_cap": 2.0}}
HIDDEN = 256
SHORT_REPEATS = 20


def bench_algorithms(
    samples: int = 96,
    actions: int = 64,
    group_size: int = 16,
    vocabulary: int = 1000,
    repeats: int = 20,
    device: str = "cpu",
) -> Report:
    """Measure the cost over GRPO of every row of the table and of the options that weigh single actions.

    `ratio/<algorithm>/update`, `ratio/<algorithm>/loss` and `ratio/<algorithm>/advantages` are times GRPO's own;
    `time/grpo/<part>_s` and `share/grpo/loss` say how much that is. All with a KL term, so that the rows
    differ in what they are and not in whether there is one.
    """
    tensors = _Tensors(samples, actions, group_size, vocabulary, device)
    variants = {name: {"name": name} for name in ALGORITHMS} | {
        f"grpo + {extra}": settings for extra, settings in EXTRAS.items()
    }
    configs = {
        label: AlgorithmConfig.model_validate({"kl_coef": 0.001, **settings})
        for label, settings in variants.items()
    }
    makers = {"update": tensors.update, "loss": tensors.loss, "advantages": tensors.advantages}
    report: Report = {}
    for part, make in makers.items():
        times = 1 if part == "update" else SHORT_REPEATS
        tasks = {label: repeated(make(config), times) for label, config in configs.items()}
        seconds = interleaved(tasks, repeats, tensors.synchronise)
        report[f"time/grpo/{part}_s"] = seconds["grpo"] / times
        for label in list(seconds)[1:]:
            report[f"ratio/{label}/{part}"] = seconds[label] / seconds["grpo"]
    report["share/grpo/loss"] = report["time/grpo/loss_s"] / report["time/grpo/update_s"]
    return report


def repeated(task: Callable[[], Any], times: int) -> Callable[[], None]:
    """Repeat the task several times: one of microseconds would measure the clock and the scheduler."""

    def run() -> None:
        for _ in range(times):
            task()

    return run


class _Tensors:
    """Samples that all algorithms share: log-probs a little off the old ones, rewards in [0, 1], the reference near."""

    def __init__(self, samples: int, actions: int, group_size: int, vocabulary: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.group_size = group_size
        self.logprobs = random(samples, actions) - 5
        self.old, self.rollout, self.reference = (
            self.logprobs + 0.1 * random(samples, actions) for _ in range(3)
        )
        self.entropy = random(samples, actions).abs()
        self.mask = torch.ones(samples, actions, dtype=torch.bool, device=device)
        self.rewards = torch.rand(samples, generator=generator, dtype=torch.float64)
        self.hidden = random(samples, actions, HIDDEN)
        self.head = (random(vocabulary, HIDDEN) / HIDDEN**0.5).requires_grad_()
        self.tokens = torch.randint(vocabulary, (samples, actions, 1), generator=generator).to(device)

    def synchronise(self) -> None:
        if self.logprobs.is_cuda:
            torch.cuda.synchronize()

    def inputs(self, config: AlgorithmConfig, logprobs: torch.Tensor) -> LossInputs:
        denominator = loss_denominator(self.mask, config.normaliser, self.mask.shape[1])
        selected = None
        if config.top_entropy < 1:
            threshold = entropy_threshold(self.entropy[self.mask].cpu().numpy(), config.top_entropy)
            selected = highest_entropy(self.entropy, self.mask, threshold)
        weights = policy_weights(self.old, self.rollout, self.mask, config.importance_cap, selected)
        advantages = self.rewards.float().to(logprobs.device)[:, None] - 0.5
        return LossInputs(logprobs, self.old, self.reference, advantages, self.mask, denominator, weights)

    def loss(self, config: AlgorithmConfig) -> Callable[[], Any]:
        loss, settings = load_loss(config), loss_settings(config, config.kl_coef)
        leaf = self.logprobs.clone().requires_grad_()
        return lambda: torch.autograd.grad(loss(self.inputs(config, leaf), **settings).loss, leaf)

    def update(self, config: AlgorithmConfig) -> Callable[[], Any]:
        loss, settings = load_loss(config), loss_settings(config, config.kl_coef)

        def task() -> Any:
            scores = (self.hidden @ self.head.T).log_softmax(-1).gather(-1, self.tokens)[..., 0]
            return torch.autograd.grad(loss(self.inputs(config, scores), **settings).loss, self.head)

        return task

    def advantages(self, config: AlgorithmConfig) -> Callable[[], Any]:
        function = load_advantages(config)
        components = torch.stack([self.rewards, self.rewards.flip(0)], dim=1)
        penalty = torch.zeros(self.mask.shape, dtype=torch.float64) if config.kl_in == "reward" else None
        mask = self.mask.cpu()
        inputs = AdvantageInputs(self.rewards, components, (1.0, 1.0), self.group_size, mask, penalty)
        return lambda: function(inputs)
