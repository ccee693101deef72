from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.seeding import generator
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.evaluation.evaluate import kl_to_reference
from imagerl.rl.rollout.engine import RolloutEngine, reward_request, to_uint8
from imagerl.rl.rollout.preparing import evaluation_sampling
from imagerl.rl.types import Prompt, RolloutGroup, Rows, SamplingParams, TokenTrajectory
from tests.models.helpers import lively_policy, stir
from tests.small_run import recipe_data

PROMPTS = [
    *prompt_set("train", 3),
    Prompt(41, "something much longer than the others, so that they are padded"),
]
PROMPTS = [Prompt(p.index, p.text, {"target": f"T{p.index}"}) for p in PROMPTS]
GROUP = 3


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    policy = lively_policy()
    stir(policy.decoder.sana)
    return policy


def engine(policy: ImagePolicy, seed: int = 0, **sampling: Any) -> RolloutEngine:
    return RolloutEngine(policy, SamplingParams(flow_steps=2, **sampling), seed, nullcontext)


def draw(
    rollout: RolloutEngine,
    prompts: list[Prompt] = PROMPTS,
    group_size: int = GROUP,
    step: int | str = 5,
    chunk: int | None = None,
) -> list[RolloutGroup]:
    return [group for part in rollout.generate(prompts, group_size, step, chunk) for group in part]


def tokens_of(groups: list[RolloutGroup]) -> torch.Tensor:
    return torch.cat([group.tokens for group in groups])


def images_of(groups: list[RolloutGroup]) -> np.ndarray:
    return np.concatenate([group.images for group in groups])


def test_groups_come_in_the_order_of_the_prompts(policy: ImagePolicy) -> None:
    groups = draw(engine(policy))
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert group.tokens.shape == group.rollout_logprobs.shape == (GROUP, policy.num_actions)
        assert group.images.shape == (GROUP, 32, 64, 3) and group.images.dtype == np.uint8
        assert group.action_mask.all() and (group.rollout_logprobs < 0).all()


@pytest.mark.parametrize("sample_chunk", [None, 2])
def test_no_prompts_are_no_groups(policy: ImagePolicy, sample_chunk: int | None) -> None:
    """As on a rank whose groups all teach something while another rank draws in place of silent ones."""
    assert list(engine(policy).generate([], GROUP, 0, sample_chunk=sample_chunk)) == []


def test_drawing_keeps_no_graph(policy: ImagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families' decoders leave it to the engine."""
    decode, seen = policy.decode, []

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return decode(*args)

    monkeypatch.setattr(policy, "decode", watched)
    draw(engine(policy))
    assert seen == [False] and torch.is_grad_enabled()


def test_kl_of_what_was_drawn(policy: ImagePolicy) -> None:
    """Against k3 by hand, on log-probs that both policies give when they score the tokens."""
    moved = lively_policy()
    moved.freeze_reference()
    groups, rollout = draw(engine(moved, temperature=0.7)), engine(moved, temperature=0.7)
    assert kl_to_reference(rollout, groups) == pytest.approx([0.0] * len(PROMPTS) * GROUP, abs=1e-9)
    with torch.no_grad():
        moved.trainable.lm.model.norm.weight.mul_(1.1)
    moved.refresh_sampler()
    groups = draw(rollout)
    rows, tokens = moved.encode(PROMPTS), tokens_of(groups)
    with torch.no_grad():
        new = moved.trainable(rows, tokens, rollout.sampling).logprobs
        old = lively_policy().trainable(rows, tokens, rollout.sampling).logprobs
    by_hand = ((old - new).exp() - (old - new) - 1).mean(1)
    assert by_hand.min() > 1e-5
    assert kl_to_reference(rollout, groups) == pytest.approx(by_hand.tolist(), rel=1e-3)


def test_a_batch_is_redrawn_bit_for_bit(policy: ImagePolicy) -> None:
    first, second = draw(engine(policy)), draw(engine(policy))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.rollout_logprobs, two.rollout_logprobs)
        assert np.array_equal(one.images, two.images)


def test_every_sample_is_its_own(policy: ImagePolicy) -> None:
    groups = draw(engine(policy))
    assert len(tokens_of(groups).unique(dim=0)) == len(PROMPTS) * GROUP
    assert len(np.unique(images_of(groups).reshape(len(PROMPTS) * GROUP, -1), axis=0)) == len(PROMPTS) * GROUP


@pytest.mark.parametrize("change", [{"step": 6}, {"step": "eval ocr"}, {"seed": 1}])
def test_steps_and_seeds_draw_differently(policy: ImagePolicy, change: dict[str, Any]) -> None:
    rollout = engine(policy, seed=change.get("seed", 0))
    groups, others = draw(engine(policy)), draw(rollout, step=change.get("step", 5))
    assert not (tokens_of(groups) == tokens_of(others)).all(1).any()
    rows = (PROMPTS, GROUP)
    assert not torch.equal(rollout.noise(change.get("step", 5), *rows), engine(policy).noise(5, *rows))


@pytest.mark.parametrize(
    ("decode", "sample", "sizes"),
    [
        (1, None, [1, 1, 1, 1]),
        (2, None, [2, 2]),
        (3, 99, [3, 1]),
        (99, None, [4]),
        (None, 3, [3, 1]),
        (2, 3, [2, 1, 1]),
    ],
)
def test_chunks_draw_the_same_samples(
    policy: ImagePolicy, decode: int | None, sample: int | None, sizes: list[int]
) -> None:
    rollout = engine(policy)
    parts = list(rollout.generate(PROMPTS, GROUP, 5, decode, sample))
    assert [len(part) for part in parts] == sizes
    assert [group.prompt for part in parts for group in part] == PROMPTS
    whole, chunked = draw(rollout), [group for part in parts for group in part]
    assert torch.equal(tokens_of(whole), tokens_of(chunked))
    assert abs(images_of(whole).astype(int) - images_of(chunked)).max() <= 1


def test_tokens_of_all_prompts_are_sampled_before_the_first_is_drawn(
    policy: ImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    sample, decode = policy.sample_tokens, policy.decode

    def sampled(prompts: Rows, uniforms: torch.Tensor, sampling: SamplingParams) -> TokenTrajectory:
        calls.append(("sample", len(uniforms)))
        return sample(prompts, uniforms, sampling)

    def decoded(prompts: Rows, trajectory: TokenTrajectory, *rest: Any) -> torch.Tensor:
        calls.append(("decode", len(trajectory.tokens)))
        return decode(prompts, trajectory, *rest)

    monkeypatch.setattr(policy, "sample_tokens", sampled)
    monkeypatch.setattr(policy, "decode", decoded)
    list(engine(policy).generate(PROMPTS, GROUP, 5, 2))
    assert calls == [("sample", 4 * GROUP), ("decode", 2 * GROUP), ("decode", 2 * GROUP)]


def test_one_prompt_alone_and_smaller_groups_use_the_same_numbers(policy: ImagePolicy) -> None:
    rollout = engine(policy)
    whole = draw(rollout)
    (alone,) = draw(rollout, [PROMPTS[2]])
    assert torch.equal(alone.tokens, whole[2].tokens)
    assert abs(alone.images.astype(int) - whole[2].images).max() <= 1
    (first,) = draw(rollout, [PROMPTS[2]], group_size=1)
    assert torch.equal(first.tokens, whole[2].tokens[:1])


def test_one_sample_alone_has_its_documented_seeds(policy: ImagePolicy) -> None:
    rollout = engine(policy, seed=7)
    prompt, sample = PROMPTS[3], 2
    numbers = generator(7, "tokens", 5, prompt.index, sample)
    uniforms = torch.rand(policy.num_actions, generator=numbers, dtype=torch.float64)
    noise = torch.randn(policy.latent_shape, generator=generator(7, "noise", 5, prompt.index, sample))
    row = 3 * GROUP + sample
    assert torch.equal(rollout.uniforms(5, PROMPTS, GROUP)[row], uniforms)
    assert torch.equal(rollout.noise(5, PROMPTS, GROUP)[row], noise)
    ids, mask = policy.encode_prompts([prompt.text])
    tokens = policy.sample_tokens({"ids": ids, "mask": mask}, uniforms[None], SamplingParams()).tokens
    assert torch.equal(tokens[0], tokens_of(draw(rollout))[row])


def test_decoder_noise_can_be_shared_within_a_group(policy: ImagePolicy) -> None:
    own = engine(policy).noise(5, PROMPTS, GROUP).view(4, GROUP, -1)
    shared = engine(policy, shared_noise=True).noise(5, PROMPTS, GROUP).view(4, GROUP, -1)
    assert (own[:, :1] != own[:, 1:]).any(-1).all()
    assert torch.equal(shared, own[:, :1].expand_as(own))
    one, two = draw(engine(policy)), draw(engine(policy, shared_noise=True))
    assert torch.equal(tokens_of(one), tokens_of(two))
    assert np.array_equal(one[0].images[0], two[0].images[0])
    assert not np.array_equal(one[0].images[1], two[0].images[1])


def test_temperature_and_guidance_reach_the_policy(policy: ImagePolicy) -> None:
    plain, cold, strong = (
        draw(engine(policy, **sampling)) for sampling in ({}, {"temperature": 1e-5}, {"guidance": 7.0})
    )
    certain = torch.cat([group.rollout_logprobs for group in cold]).abs() < 0.05
    assert certain.float().mean() > 0.9  # but for near ties
    assert torch.equal(tokens_of(plain), tokens_of(strong))
    assert not np.array_equal(images_of(plain), images_of(strong))


def test_pictures_are_decoded_under_autocast_but_tokens_never(policy: ImagePolicy) -> None:
    inside: list[bool] = []

    class Autocast(torch.autocast):
        def __enter__(self) -> Any:
            inside.append(True)
            return super().__enter__()

    rollout = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, lambda: Autocast("cpu", torch.bfloat16))
    groups = draw(rollout)
    assert inside == [True]
    plain = draw(engine(policy))
    for one, two in zip(groups, plain, strict=True):
        assert torch.equal(one.rollout_logprobs, two.rollout_logprobs)
    assert not np.array_equal(images_of(groups), images_of(plain))


def test_pixels_are_rounded_to_nearest_and_channels_last() -> None:
    pictures = torch.zeros(1, 3, 2, 4)
    pictures[0, 0, 0, 1], pictures[0, 2, 1, 3], pictures[0, 1, 1, 0] = 1.0, 0.4999, 0.503
    pixels = to_uint8(pictures)
    assert pixels.shape == (1, 2, 4, 3) and pixels.dtype == np.uint8
    assert (pixels[0, 0, 1, 0], pixels[0, 1, 3, 2], pixels[0, 1, 0, 1]) == (255, 127, 128)
    assert pixels.sum() == 255 + 127 + 128


def test_rewards_get_one_entry_per_sample(policy: ImagePolicy) -> None:
    groups = draw(engine(policy))
    request = reward_request(groups)
    assert request.group_size == GROUP
    assert request.prompts == [prompt.text for prompt in PROMPTS for _ in range(GROUP)]
    assert request.columns == {"target": [f"T{prompt.index}" for prompt in PROMPTS for _ in range(GROUP)]}
    assert request.completions == tokens_of(groups).tolist()
    assert np.array_equal(request.images, images_of(groups))


@pytest.mark.parametrize(
    ("overrides", "guidance"),
    [
        ((), 2.0),
        (("rollout.guidance=1.5",), 1.5),
        (("rollout.guidance=1.5", "algorithm.flow={name: flow_grpo, guidance: 1.0}"), 1.0),
        (("algorithm.flow={name: nft}",), 1.0),
        (("algorithm.flow={name: flow_grpo, guidance: 1.0}", "eval.guidance=3.0"), 3.0),
    ],
)
def test_a_run_is_judged_and_exported_as_its_decoder_trains(
    overrides: tuple[str, ...], guidance: float
) -> None:
    recipe = validate_recipe(Recipe, recipe_data(Path("unused"), "rollout.flow_steps=2", *overrides), "test")
    assert evaluation_sampling(recipe).guidance == guidance
