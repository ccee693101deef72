"""Number-for-number agreement with the public inference code, text-to-image and editing: float32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next import flow_decoder
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.weights import full_state
from imagerl.rl.types import SamplingParams
from tests.parity import VARIANTS, Fixture, fixture, policy_of

TOLERANCE = 1e-5


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Off by at most 1e-5 of the largest value, or of 1. Processors differ by a few float32 roundings: diffusers' own
    modules, composed plainly, are 1.3e-5 from the fixtures' latents (up to 17) on one and 0 on another."""
    assert found.shape == wanted.shape
    difference = (found - wanted).abs().max().item()
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
    assert difference <= allowed, f"off by {difference:.2e}, allowed {allowed:.2e}"


@pytest.fixture(params=VARIANTS, scope="module")
def given(request: pytest.FixtureRequest) -> Fixture:
    return fixture(request.param)


@pytest.fixture(scope="module")
def policy(given: Fixture) -> ImagePolicy:
    return policy_of(given.json["variant"])


@pytest.fixture(scope="module")
def hidden(given: Fixture, policy: ImagePolicy) -> Tensor:
    """[B, T + 1, D] ours."""
    mask = torch.ones_like(given.prompt_ids, dtype=torch.bool)
    with torch.no_grad():
        return policy.trainable.hidden_states(given.prompt_ids, mask, given.tokens)


@pytest.fixture(scope="module")
def drawn(given: Fixture, policy: ImagePolicy) -> tuple[Tensor, list[Tensor]]:
    """Our latents from the fixture's hidden states, and the raw velocity of every step on the way."""
    velocities: list[Tensor] = []
    velocity = flow_decoder.velocity

    def spy(*arguments: Any) -> Tensor:
        velocities.append(velocity(*arguments))
        return velocities[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_decoder, "velocity", spy)
        latents = policy.decoder.latents(
            given["hidden"], given["noise"], given.json["guidance"], given.json["steps"], given.reference
        )
    return latents, velocities


def test_keys_and_shapes_are_the_published_ones(given: Fixture, policy: ImagePolicy) -> None:
    assert {name: tuple(t.shape) for name, t in full_state(policy).items()} == given.shapes


def test_hidden_states(given: Fixture, hidden: Tensor) -> None:
    assert_equal(hidden, given["hidden"])


def test_log_probs(given: Fixture, policy: ImagePolicy, hidden: Tensor) -> None:
    """The fixture's are under the full softmax; ours, over image columns, are higher by those columns' share."""
    logits = policy.trainable.lm.lm_head(hidden[:, :-1])
    columns = policy.vocabulary.columns
    full = logits.log_softmax(-1)
    wanted = given["token_logprobs"]
    chosen = (given.tokens + columns.start)[..., None]
    assert_equal(full.gather(-1, chosen)[..., 0], wanted)
    mask = torch.ones_like(given.prompt_ids, dtype=torch.bool)
    with torch.no_grad():
        ours = policy.trainable(
            {"ids": given.prompt_ids, "mask": mask}, given.tokens, SamplingParams()
        ).logprobs
    assert_equal(ours, wanted - full[..., columns].logsumexp(-1))


def test_schedule(given: Fixture, policy: ImagePolicy) -> None:
    sigmas = policy.decoder.sigmas(given.json["steps"])
    assert_equal(sigmas[:-1] * 1000, given["timesteps"])
    assert sigmas[-1] == 0


def test_connector(given: Fixture, policy: ImagePolicy) -> None:
    states = torch.cat([torch.zeros_like(given["hidden"]), given["hidden"]])
    assert_equal(policy.decoder.connector(states)[:, ::73, ::64], given["condition_sample"])


def test_velocities_of_both_branches(given: Fixture, drawn: tuple[Tensor, list[Tensor]]) -> None:
    _, velocities = drawn
    assert len(velocities) == given.json["steps"]
    assert_equal(velocities[0], given["velocity_first"])
    assert_equal(velocities[-1], given["velocity_last"])


def test_latents_after_all_steps(
    given: Fixture, policy: ImagePolicy, drawn: tuple[Tensor, list[Tensor]]
) -> None:
    assert_equal(drawn[0] / policy.decoder.scaling_factor, given["latents"])


def test_picture(given: Fixture, policy: ImagePolicy, drawn: tuple[Tensor, list[Tensor]]) -> None:
    picture = policy.decoder.draw(drawn[0])
    assert tuple(picture.shape[-2:]) == policy.decoder.picture_size
    assert_equal(picture[:, :, 480:544, 480:544], given["image_crop"])
    assert_equal(picture.mean(dim=(0, 2, 3)), given["image_mean"])


def test_tokens_of_a_picture_are_exact(given: Fixture, policy: ImagePolicy) -> None:
    assert policy.image_tokenizer is not None
    assert torch.equal(policy.image_tokenizer.encode(given["image"]), given["ta_tok_tokens"])


def test_the_edit_prompt_holds_the_tokens_of_the_reference() -> None:
    given = fixture("edit")
    ids = given["ta_tok_tokens"] + policy_of("edit").vocabulary.image_start_token_id
    windows = given.prompt_ids.unfold(1, ids.shape[1], 1)
    assert (windows == ids[:, None]).all(-1).sum() == len(ids)


def test_sampler_agrees_with_the_teacher_forced_pass(given: Fixture, policy: ImagePolicy) -> None:
    """On the fixture's own prompts: in an edit most of the prompt is a picture."""
    mask = torch.ones_like(given.prompt_ids, dtype=torch.bool)
    uniforms = torch.rand(2 * len(mask), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = {"ids": given.prompt_ids, "mask": mask}
    sampled = policy.sample_tokens(prompts, uniforms, SamplingParams())
    with torch.no_grad():
        hidden = policy.trainable.hidden_states(given.prompt_ids, mask, sampled.tokens)
        scores = policy.trainable(prompts, sampled.tokens, SamplingParams())
    assert_equal(sampled.states["hidden"], hidden)
    assert_equal(sampled.rollout_logprobs, scores.logprobs)
