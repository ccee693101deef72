from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reference import ReferenceStep, compared
from imagerl.rl.config.train import load_recipe
from imagerl.rl.types import RewardRequest, RewardScores, Rows, SamplingParams, repeat
from tests.models.helpers import lively_policy

RECIPE = str(Path(__file__).parents[2] / "recipes" / "tiny_ocr_grpo.yaml")


def reference() -> tuple[ReferenceStep, Rows]:
    overrides = ["rollout.prompts_per_step=2", "rollout.group_size=3", "engine.micro_batch_size=3"]
    step = ReferenceStep(lively_policy(), load_recipe(RECIPE, overrides), score)
    return step, repeat(step.policy.encode(step.prompts[:2]), 3)


def score(request: RewardRequest) -> RewardScores:
    return RewardScores(request.images.mean((1, 2, 3), dtype=np.float64), {}, {}, {})


def test_it_draws_what_ours_does() -> None:
    """Hidden states and guided latents, of tokens that `generate` has drawn."""
    step, rows = reference()
    policy = step.policy
    noise = torch.randn(6, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = step.generate(rows)
        tokens = ids - step.first_id
        assert int(tokens.min()) >= 0 and int(tokens.max()) < policy.vocabulary.num_image_tokens
        hidden = step.hidden_states(rows, ids)
        ours = policy.trainable.hidden_states(rows["ids"], rows["mask"], tokens)
        torch.testing.assert_close(hidden, ours, rtol=1e-4, atol=1e-5)
        latents = policy.decoder.latents(hidden, noise, 2.0, 2)
        torch.testing.assert_close(step.latents(hidden, noise), latents, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_grpo(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ratios of 1 it is the mean of advantages times the gradients of log-probs. Ours are over the image columns
    alone, so here theirs are held to these."""
    step, rows = reference()
    policy = step.policy
    lm, columns = step.lm, policy.vocabulary.columns
    with torch.no_grad():
        ids = step.generate(rows)
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.3, 0.3, -0.6])
    kept: dict[str, torch.Tensor] = {}

    def keep() -> None:
        kept.update({name: p.grad.clone() for name, p in lm.model.layers.named_parameters()})

    monkeypatch.setattr(step.optimizer, "step", keep)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    whole = lm.forward

    def image_columns_alone(**given: torch.Tensor) -> object:
        output = whole(**given)
        other = torch.full_like(output.logits, float("-inf"))
        other[..., columns] = output.logits[..., columns]
        output.logits = other
        return output

    monkeypatch.setattr(lm, "forward", image_columns_alone)
    step.update(rows, ids, advantages)
    scores = policy.trainable(rows, ids - step.first_id, SamplingParams(temperature=1.0))
    (scores.logprobs * advantages[:, None]).mean().neg().backward()
    for name, parameter in lm.model.layers.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_steps_are_timed_around_ours() -> None:
    step, _ = reference()
    before: list[int] = []

    def ours() -> dict[str, float]:
        before.append(len(step.seconds["update"]))
        return {f"time/{phase}_s": 1e-9 for phase in ("step", *step.seconds)}

    report = compared(step, ours, 2)
    assert before == [2] and len(step.seconds["update"]) == 4  # one warms up, one counts, on either side
    counted = [sum(values[i] for values in step.seconds.values()) for i in (1, 3)]
    assert report["ratio/step_over_reference"] == pytest.approx(sum(counted) / 2 / 1e-9)
