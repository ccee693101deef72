import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rl.losses import Normaliser, action_weights, grpo_loss, loss_denominator, resolve_loss
from rl.types import ImageRLError, LossInputs

NORMALISERS = get_args(Normaliser)
LENGTHS = [7, 3, 5, 1, 7, 2]


def example(normaliser: Normaliser = "sequence", dtype=torch.float64, lengths=LENGTHS, seed=0) -> LossInputs:
    """Six samples of unequal lengths whose ratios lie on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 7)
    logprobs, moved, reference = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    advantages = torch.randn(shape[0], 1, generator=generator, dtype=dtype)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    logprobs = logprobs - 3
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs + 0.4 * moved,
        ref_logprobs=logprobs + 0.3 * reference,
        advantages=advantages,
        action_mask=mask,
        denominator=loss_denominator(mask, normaliser, max_length=7),
    )


def rows(inputs: LossInputs, index: Any) -> LossInputs:
    """Some samples of a batch, as leaves of their own; the denominator stays that of the batch."""
    assert inputs.ref_logprobs is not None
    return LossInputs(
        inputs.logprobs.detach()[index].requires_grad_(),
        inputs.old_logprobs[index],
        inputs.ref_logprobs[index],
        inputs.advantages[index],
        inputs.action_mask[index],
        inputs.denominator,
    )


def backward(inputs: LossInputs, **settings: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = grpo_loss(inputs, **settings)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
    return output.loss.detach(), gradient, output.metrics


def hand_inputs(denominator: float) -> LossInputs:
    """Ratios 2, 1 | 0.5, 1.1 of samples with advantage 1 and -1; the last action is masked."""
    old = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]], dtype=torch.float64)
    ratio = torch.tensor([[2.0, 1.0], [0.5, 1.1]], dtype=torch.float64)
    return LossInputs(
        logprobs=(old + ratio.log()).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=old,
        advantages=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        action_mask=torch.tensor([[True, True], [True, False]]),
        denominator=denominator,
    )


@pytest.mark.parametrize(
    ("normaliser", "denominator", "loss", "gradient"),
    [  # clipped terms: -1.2, -1 | +0.8; only the on-policy action keeps a gradient, -ratio * advantage
        ("sequence", 2, ((-1.2 - 1.0) / 2 + 0.8) / 2, -1 / 4),
        ("tokens", 3, (-1.2 - 1.0 + 0.8) / 3, -1 / 3),
        ("constant", 4, (-1.2 - 1.0 + 0.8) / 4, -1 / 4),
    ],
)
def test_hand_values_of_the_clipped_surrogate(normaliser, denominator, loss, gradient):
    inputs = hand_inputs(denominator)
    assert loss_denominator(inputs.action_mask, normaliser, max_length=2) == denominator
    value, grad, metrics = backward(inputs, normaliser=normaliser)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(grad, torch.tensor([[0, gradient], [0, 0]], dtype=torch.float64))
    sums = {name: metrics[name].item() for name in ("actions", "ratio", "ratio_deviation")}
    assert sums == pytest.approx({"actions": 3, "ratio": 3.5, "ratio_deviation": 1.5})
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (1, 1)


def test_hand_values_of_the_kl_term():
    # Against ref = old, d = -log ratio: k3 is 0.5 + log 2 - 1 at ratio 2 and 2 - log 2 - 1 at ratio 0.5.
    k3 = {"k3": (0.5 + math.log(2) - 1) + (2 - math.log(2) - 1), "k2": math.log(2) ** 2, "k1": 0.0}
    for estimator, total in k3.items():
        plain, plain_gradient, metrics = backward(hand_inputs(3), normaliser="tokens")
        value, gradient, _ = backward(
            hand_inputs(3), normaliser="tokens", kl_coef=0.5, kl_estimator=estimator
        )
        assert (value - plain).item() == pytest.approx(0.5 * total / 3, abs=1e-12)
        assert metrics[f"kl_{estimator}"].item() == pytest.approx(total, abs=1e-12)
        assert (gradient - plain_gradient)[0, 0] != 0
        assert gradient[1, 1] == 0


def test_clipping_depends_on_the_sign_of_the_advantage():
    """A ratio outside the clip keeps its gradient when the surrogate there is the worse of the two."""
    inputs = hand_inputs(3)
    inputs = replace(inputs, advantages=-inputs.advantages)
    value, gradient, metrics = backward(inputs, normaliser="tokens")
    assert value.item() == pytest.approx((2 + 1 - 0.5) / 3)
    torch.testing.assert_close(gradient, torch.tensor([[2, 1], [-0.5, 0]], dtype=torch.float64) / 3)
    assert metrics["clip_low"].item() == metrics["clip_high"].item() == 0


def test_each_side_has_its_own_clip():
    value, _, metrics = backward(hand_inputs(3), normaliser="tokens", clip_low=0.6, clip_high=0.28)
    assert value.item() == pytest.approx((-1.28 - 1.0 + 0.5) / 3)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (0, 1)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_on_policy_gradient_is_the_policy_gradient(normaliser):
    inputs = example(normaliser)
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach())
    _, gradient, metrics = backward(inputs, normaliser=normaliser)
    weights = action_weights(inputs.action_mask, normaliser)
    torch.testing.assert_close(gradient, -inputs.advantages * weights / inputs.denominator)
    assert metrics["ratio"] == metrics["actions"] == sum(LENGTHS)
    assert all(metrics[name] == 0 for name in ("ratio_deviation", "clip_low", "clip_high", "old_kl"))


def test_advantages_may_differ_between_actions():
    inputs = example()
    per_action = replace(inputs, advantages=inputs.advantages.repeat(1, 7))
    for one, other in zip(backward(inputs)[:2], backward(per_action)[:2], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"\[B, N\] or \[B, 1\]"):
        grpo_loss(replace(inputs, advantages=inputs.advantages[:, 0]))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
def test_accumulated_microbatches_equal_one_batch(normaliser, sizes):
    whole = example(normaliser)
    settings = {"normaliser": normaliser, "kl_coef": 0.1}
    loss, gradient, metrics = backward(whole, **settings)
    parts = [backward(rows(whole, torch.arange(6).split(sizes)[i]), **settings) for i in range(len(sizes))]
    torch.testing.assert_close(torch.stack([p[0] for p in parts]).sum(), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient, rtol=0, atol=1e-14)
    for name, total in metrics.items():
        torch.testing.assert_close(torch.stack([p[2][name] for p in parts]).sum(), total)
    ranks = [loss_denominator(mask, normaliser, 7) for mask in whole.action_mask.split(sizes)]
    assert sum(ranks) == whole.denominator


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_permuting_the_batch_permutes_the_gradient(normaliser):
    whole, order = example(normaliser), torch.tensor([3, 0, 5, 1, 4, 2])
    settings = {"normaliser": normaliser, "kl_coef": 0.1, "kl_estimator": "k2"}
    loss, gradient, _ = backward(whole, **settings)
    permuted_loss, permuted_gradient, _ = backward(rows(whole, order), **settings)
    torch.testing.assert_close(permuted_loss, loss, rtol=0, atol=1e-14)
    assert torch.equal(permuted_gradient, gradient[order])


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_cannot_poison(normaliser, garbage):
    lengths = [7, 0, 5, 1, 0, 2]
    clean = example(normaliser, lengths=lengths)
    hole = ~clean.action_mask
    assert clean.ref_logprobs is not None
    dirty = replace(
        clean,
        logprobs=clean.logprobs.detach().masked_fill(hole, garbage).requires_grad_(),
        old_logprobs=clean.old_logprobs.masked_fill(hole, -garbage),
        ref_logprobs=clean.ref_logprobs.masked_fill(hole, garbage),
        advantages=clean.advantages.repeat(1, 7).masked_fill(hole, garbage),
    )
    settings = {"normaliser": normaliser, "kl_coef": 0.1}
    expected, result = backward(clean, **settings), backward(dirty, **settings)
    assert torch.equal(result[0], expected[0])
    assert torch.isfinite(result[0])
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[1][hole], torch.zeros(int(hole.sum()), dtype=torch.float64))
    assert {name: v.item() for name, v in result[2].items()} == {n: v.item() for n, v in expected[2].items()}


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_sample_that_must_not_train_leaves_no_trace(normaliser):
    padded = example(normaliser, lengths=[7, 0, 5, 1, 0, 2])
    keep = padded.action_mask.any(dim=1)
    alone = rows(padded, keep)
    assert loss_denominator(alone.action_mask, normaliser, 7) == padded.denominator
    torch.testing.assert_close(
        grpo_loss(alone, normaliser=normaliser, kl_coef=0.1).loss,
        grpo_loss(padded, normaliser=normaliser, kl_coef=0.1).loss,
        rtol=0,
        atol=1e-14,
    )


def test_a_microbatch_without_actions_is_zero_and_differentiable():
    inputs = example(lengths=[0] * 6)
    assert [loss_denominator(inputs.action_mask, n, 7) for n in NORMALISERS] == [0.0] * 3
    loss, gradient, metrics = backward(replace(inputs, denominator=5.0), kl_coef=0.1)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(value == 0 for value in metrics.values())
    with pytest.raises(ValueError, match="nothing trains"):
        grpo_loss(inputs)


def test_wrong_settings_are_refused():
    inputs = example()
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(replace(inputs, ref_logprobs=None), kl_coef=0.1)
    assert "kl_k3" not in grpo_loss(replace(inputs, ref_logprobs=None)).metrics
    with pytest.raises(ValueError, match="sequence, tokens, constant"):
        loss_denominator(inputs.action_mask, "mean", 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence, tokens, constant"):
        grpo_loss(inputs, normaliser="mean")  # type: ignore[arg-type]


def test_algorithms_resolve_by_name():
    assert resolve_loss("grpo") is grpo_loss
    with pytest.raises(ImageRLError, match=r"'gppo'; did you mean 'grpo'\? known: grpo") as error:
        resolve_loss("gppo")
    assert "\n" not in str(error.value)
    with pytest.raises(ImageRLError, match=r"'zzz'; known: grpo"):
        resolve_loss("zzz")


# TRL 1.16 as the oracle: its own trainer's loss on the same log-probs, by value and by gradient.


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's GRPOTrainer around a model too small to matter: the tests hand it the log-probs."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return GRPOTrainer(
        model=Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            report_to=[],
            max_completion_length=7,
            per_device_train_batch_size=6,
            num_generations=6,
            gradient_accumulation_steps=1,
            use_bias_correction_kl=False,  # on by default, and not in the published objective
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 6}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )


def trl_loss(
    trainer: Any, inputs: LossInputs, loss_type: str, low: float, high: float, beta: float
) -> tuple[Tensor, Tensor]:
    trainer.loss_type, trainer.beta = loss_type, beta
    trainer.epsilon_low, trainer.epsilon_high = low, high
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        inputs.logprobs,
        torch.zeros_like(inputs.logprobs),
        None,
    )
    size = len(inputs.logprobs)
    loss = trainer.compute_loss(
        trainer.model.train(),
        {
            "prompt_ids": torch.full((size, 1), 2),
            "prompt_mask": torch.ones(size, 1, dtype=torch.long),
            "completion_ids": torch.full((size, 7), 2),
            "completion_mask": inputs.action_mask.long(),
            "advantages": inputs.advantages[:, 0],
            "old_per_token_logps": inputs.old_logprobs,
            "ref_per_token_logps": inputs.ref_logprobs,
            "num_items_in_batch": inputs.action_mask.sum(),
        },
    )
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return loss.detach(), gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "normaliser"),
    [("grpo", "sequence"), ("bnpo", "tokens"), ("dapo", "tokens"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.3, 0.05)])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loss_of_trl(trl_trainer, loss_type, normaliser, low, high, beta, dtype):
    inputs = example(normaliser, dtype)
    theirs, their_gradient = trl_loss(trl_trainer, inputs, loss_type, low, high, beta)
    ours, our_gradient, metrics = backward(
        inputs, clip_low=low, clip_high=high, kl_coef=beta, normaliser=normaliser
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)
    assert metrics["clip_low"] > 0
    assert metrics["clip_high"] > 0
