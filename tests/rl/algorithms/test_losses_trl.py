"""TRL 1.16 as the oracle: its own trainers' losses on the same log-probs, by value and by gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.losses import entropy_threshold, highest_entropy, policy_weights
from imagerl.rl.types import LossInputs
from tests.loss_examples import backward, example, settings_of

pytestmark = pytest.mark.slow
DTYPES = [torch.float32, torch.float64]
SEED = 2  # ratios of single actions and of whole samples lie beyond both clips, in both types

# algorithm -> what TRL calls it: loss type, level of the ratio
GRPO_FAMILY = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "bnpo": ("bnpo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "token"),
    "luspo": ("luspo", "sequence"),
}


def trainer(kind: str, folder: Path, **settings: Any) -> Any:
    """One of TRL's trainers around a model too small to matter: the tests hand it the log-probs."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if kind == "GMPO":
        from trl.experimental import gmpo as trl  # type: ignore[no-redef]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return getattr(trl, f"{kind}Trainer")(
        model=Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=getattr(trl, f"{kind}Config")(
            str(folder),
            use_cpu=True,
            report_to=[],
            max_completion_length=7,
            per_device_train_batch_size=6,
            num_generations=6,
            gradient_accumulation_steps=1,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 6}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # The correction is on by default, and not in the published objective.
    return trainer("GRPO", tmp_path_factory.mktemp("trl"), use_bias_correction_kl=False)


@contextmanager
def set_to(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def their_loss(
    trl_trainer: Any, inputs: LossInputs, entropies: Tensor | None = None, **more: Any
) -> tuple[Tensor, Tensor]:
    """Value and gradient of what the trainer's compute_loss makes of our tensors."""
    entropies = torch.zeros_like(inputs.logprobs) if entropies is None else entropies
    trl_trainer.current_gradient_accumulation_steps = 1
    trl_trainer._get_per_token_logps_and_entropies = lambda *_, **__: (inputs.logprobs, entropies, None)
    size, mask = len(inputs.logprobs), inputs.action_mask
    loss = trl_trainer.compute_loss(
        trl_trainer.model.train(),
        {
            "prompt_ids": torch.full((size, 1), 2),
            "prompt_mask": torch.ones(size, 1, dtype=torch.long),
            "completion_ids": torch.full((size, 7), 2),
            "completion_mask": mask.long(),
            "advantages": inputs.advantages[:, 0],
            "old_per_token_logps": inputs.old_logprobs,
            "old_logps": (inputs.old_logprobs * mask).sum(1),
            "ref_per_token_logps": inputs.ref_logprobs,
            "num_items_in_batch": mask.sum(),
            **more,
        },
    )
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return loss.detach(), gradient


def assert_equal(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], gradient: bool = True, name: str = ""
) -> None:
    exact = ours[0].dtype == torch.float64 and name != "sapo"  # TRL rounds SAPO's temperature to float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12 if exact else 1e-6)
    if gradient:
        relative, absolute = (1e-10, 1e-12) if exact else (1e-5, 1e-6)
        torch.testing.assert_close(ours[1], theirs[1], rtol=relative, atol=absolute)


def clips(name: str, low: float, high: float) -> dict[str, float]:
    """Ours for TRL's epsilons: CISPO's cap is absolute there."""
    return (
        {"clip_low": 1.0, "clip_high": high - 1} if name == "cispo" else {"clip_low": low, "clip_high": high}
    )


@pytest.mark.parametrize("name", GRPO_FAMILY)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.3, 0.05)])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_loss_of_trl(grpo_trainer, name, low, high, beta, dtype):
    loss_type, level = GRPO_FAMILY[name]
    if name == "cispo":
        high += 1  # or it would be a cap far below 1
    if level == "sequence":  # means of log-ratios stay closer to 0
        low, high = low / 8, high / 8
    settings = settings_of(name, **clips(name, low, high), kl_coef=beta)
    inputs = example(settings["normaliser"], dtype, seed=SEED)
    with set_to(
        grpo_trainer, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=low,
        epsilon_high=high,
    ):  # fmt: skip
        theirs = their_loss(grpo_trainer, inputs)
    ours = backward(inputs, **settings)
    assert_equal(ours, theirs, name=name)
    if settings["clip"] == "ratio":
        assert ours[2]["clip_low"] > 0 and ours[2]["clip_high"] > 0
    if name == "cispo":
        assert ours[2]["clip_high"] > 0


def test_gspo_and_cispo_are_not_grpo(grpo_trainer):
    """Or the equalities above would say less than they seem to."""
    values = {backward(example("sequence"), **settings_of(n, normaliser="sequence"))[0].item()
              for n in ("grpo", "gspo", "cispo", "sapo", "gmpo", "reinforce", "rloo")}  # fmt: skip
    assert len(values) == 7


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.1, 0.3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gmpo_equals_the_experimental_trainer_of_trl(tmp_path, beta, low, high, dtype):
    oracle = trainer("GMPO", tmp_path)
    inputs = example("sequence", dtype, seed=SEED)
    with set_to(oracle, beta=beta, epsilon_low=low, epsilon_high=high):
        theirs = their_loss(oracle, inputs)
    ours = backward(inputs, **settings_of("gmpo", clip_low=low, clip_high=high, kl_coef=beta))
    assert_equal(ours, theirs)
    assert ours[2]["clip_low"] > 0 and ours[2]["clip_high"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rloo_equals_the_trainer_of_trl(tmp_path, dtype):
    oracle = trainer("RLOO", tmp_path, beta=0.0)
    inputs = example("sequence", dtype, seed=SEED)
    with set_to(oracle, epsilon_low=0.3, epsilon_high=0.1):
        theirs = their_loss(oracle, inputs)
    ours = backward(inputs, **settings_of("rloo", clip_low=0.3, clip_high=0.1))
    assert_equal(ours, theirs)
    assert ours[2]["clip_low"] > 0 and ours[2]["clip_high"] > 0


@pytest.mark.parametrize("name", GRPO_FAMILY)
@pytest.mark.parametrize("cap", [1.1, 2.0])
def test_truncated_importance_equals_that_of_trl(grpo_trainer, name, cap):
    loss_type, level = GRPO_FAMILY[name]
    settings = settings_of(name, **clips(name, 0.2, 1.5), kl_coef=0.1)
    inputs = example(settings["normaliser"])
    noise = torch.randn(6, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rollout = inputs.old_logprobs + 0.5 * noise
    weights = policy_weights(inputs.old_logprobs, rollout, inputs.action_mask, cap, None)
    assert weights is not None and weights.max() == cap and weights[inputs.action_mask].min() < 0.8
    with set_to(
        grpo_trainer, loss_type=loss_type, importance_sampling_level=level, beta=0.1, epsilon_low=0.2,
        epsilon_high=1.5, use_vllm=True, vllm_importance_sampling_correction=True,
    ):  # fmt: skip
        ratio = torch.clamp(torch.exp(inputs.old_logprobs - rollout), max=cap)  # as it stands there
        theirs = their_loss(grpo_trainer, inputs, importance_sampling_ratio=ratio)
    ours = backward(replace(inputs, policy_weights=weights), **settings)
    # A sequence-level ratio has each action's own gradient here, the sample's there: docs/algorithms.md.
    assert_equal(ours, theirs, gradient=level == "token", name=name)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("top", [0.2, 0.5, 0.9])
def test_high_entropy_mask_equals_that_of_trl(grpo_trainer, name, top):
    loss_type, level = GRPO_FAMILY[name]
    settings = settings_of(name, **clips(name, 0.2, 1.5), kl_coef=0.1)
    inputs = example(settings["normaliser"])
    entropies = torch.rand(6, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mask = inputs.action_mask
    threshold = entropy_threshold(entropies[mask].float().numpy(), top)
    selected = highest_entropy(entropies.float(), mask, threshold)
    assert torch.equal(selected, grpo_trainer.get_high_entropy_mask(entropies.float(), mask.long(), 1 - top))
    assert abs(int(selected.sum()) - top * int(mask.sum())) <= 1
    with set_to(
        grpo_trainer, loss_type=loss_type, importance_sampling_level=level, beta=0.1, epsilon_low=0.2,
        epsilon_high=1.5, top_entropy_quantile=top,
    ):  # fmt: skip
        theirs = their_loss(grpo_trainer, inputs, entropies.float())
    weights = policy_weights(inputs.old_logprobs, inputs.old_logprobs, mask, None, selected)
    assert_equal(backward(replace(inputs, policy_weights=weights), **settings), theirs, name=name)
