"""Edits in batches: several references, prompts of different lengths, several pictures of each, all as one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imagerl.models.blip3o_next.flow_decoder import caption_keys, velocity
from imagerl.models.blip3o_next.loading import read_weights, save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.types import ImageRLError, SamplingParams
from tests.micro import micro_policy
from tests.models.helpers import decode, edit_policy, load_policy, uniforms

INSTRUCTIONS = ("red ink", 'replace the word by "ZEBRA" and keep everything else', "ünïcödé, a little longer")
GROUP = 2


@pytest.fixture(scope="module")
def edit_model() -> tuple[ImagePolicy, dict[str, Any]]:
    return edit_policy()


@pytest.fixture(scope="module")
def policy(edit_model: tuple[ImagePolicy, dict[str, Any]]) -> ImagePolicy:
    return edit_model[0]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise_of(policy: ImagePolicy, batch: int, seed: int = 3) -> Tensor:
    return torch.randn(batch, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def edited(policy: ImagePolicy, pictures: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, hidden states and pictures of the chosen rows' edits, sampled together."""
    tokens, latents = policy.reference_of(pictures[rows])
    ids, mask = policy.encode_prompts([INSTRUCTIONS[row] for row in rows], tokens)
    samples = [GROUP * row + member for row in rows for member in range(GROUP)]
    drawn = policy.sample_tokens(
        {"ids": ids, "mask": mask}, uniforms(policy, 3 * GROUP)[samples], SamplingParams()
    )
    noise = noise_of(policy, 3 * GROUP)[samples]
    return (
        drawn.tokens,
        drawn.states["hidden"],
        decode(policy, drawn.states["hidden"], noise, 2.0, 3, latents),
    )


def test_a_batch_of_edits_is_as_one_by_one(policy: ImagePolicy, pictures: Tensor) -> None:
    _, mask = policy.encode_prompts(INSTRUCTIONS, policy.reference_of(pictures)[0])
    assert mask.sum(1).unique().numel() == 3  # three lengths, so padding is at work
    tokens, hidden, images = edited(policy, pictures, [0, 1, 2])
    for row in range(3):
        own = slice(GROUP * row, GROUP * row + GROUP)
        alone = edited(policy, pictures, [row])
        assert torch.equal(tokens[own], alone[0])
        torch.testing.assert_close(hidden[own], alone[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(images[own], alone[2], rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    assert (images[:GROUP] - images[GROUP : 2 * GROUP]).abs().max() > 0.01


def test_captions_and_edits_give_the_same_in_any_order(policy: ImagePolicy, pictures: Tensor) -> None:
    forward, backward = edited(policy, pictures, [0, 2]), edited(policy, pictures, [2, 0])
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(one[:GROUP].float(), other[GROUP:].float(), rtol=1e-5, atol=1e-5)


def test_the_sampler_agrees_with_the_teacher_forced_pass(policy: ImagePolicy, pictures: Tensor) -> None:
    ids, mask = policy.encode_prompts(INSTRUCTIONS, policy.reference_of(pictures)[0])
    drawn = policy.sample_tokens({"ids": ids, "mask": mask}, uniforms(policy, 3 * GROUP), SamplingParams(0.9))
    scores = policy.trainable({"ids": ids, "mask": mask}, drawn.tokens, SamplingParams(0.9))
    torch.testing.assert_close(drawn.rollout_logprobs, scores.logprobs, rtol=1e-5, atol=1e-5)
    hidden = policy.trainable.hidden_states(ids, mask, drawn.tokens)
    torch.testing.assert_close(drawn.states["hidden"], hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["tokens", "latents"])
def test_both_views_of_the_reference_matter(policy: ImagePolicy, pictures: Tensor, part: str) -> None:
    tokens, latents = policy.reference_of(pictures[:1])
    others = policy.reference_of(pictures[1:2])
    ids, mask = policy.encode_prompts(INSTRUCTIONS[:1], others[0] if part == "tokens" else tokens)
    hidden = policy.trainable.hidden_states(ids, mask, tokens)
    changed = others[1] if part == "latents" else latents
    noise = noise_of(policy, 1)
    ids, mask = policy.encode_prompts(INSTRUCTIONS[:1], tokens)
    plain = decode(policy, policy.trainable.hidden_states(ids, mask, tokens), noise, 2.0, 3, latents)
    assert (decode(policy, hidden, noise, 2.0, 3, changed) - plain).abs().max() > 1e-3


def by_diffusers(
    policy: ImagePolicy, hidden: Tensor, noisy: Tensor, reference: Tensor, sigma: Tensor
) -> Tensor:
    """The transformer's own forward on the published arrangement: [noisy | reference], hidden states then reference."""
    decoder = policy.decoder
    assert decoder.reference_connector is not None
    seen = decoder.reference_connector(reference.movedim(1, -1).flatten(1, 2))
    features = torch.cat([decoder.connector(hidden), seen], dim=1)
    wide = torch.cat([noisy, reference], dim=-1)
    return decoder.sana(wide, features, sigma * 1000.0, return_dict=False)[0][..., : noisy.shape[-1]]


def test_flow_loss_of_an_edit_compares_the_left_half(policy: ImagePolicy) -> None:
    decoder, draws = policy.decoder, torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, 32, generator=draws)
    latents, noise, reference = (torch.randn(2, *decoder.latent_shape, generator=draws) for _ in range(3))
    sigma = torch.tensor([0.3, 0.8])
    noisy = latents + sigma[:, None, None, None] * (noise - latents)
    v = by_diffusers(policy, hidden, noisy, reference, sigma)
    wanted = (v - (noise - latents)).square().mean()
    kept = torch.tensor([False, False])
    torch.testing.assert_close(decoder.flow_loss(hidden, latents, sigma, noise, kept, reference), wanted)


def test_dropping_an_edits_condition_is_the_unconditional_branch(policy: ImagePolicy) -> None:
    """The reference stays beside the noise; its part of the condition is zeros, not the connector of zeros."""
    decoder, draws = policy.decoder, torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 9, 32, generator=draws)
    latents, noise, reference = (torch.randn(1, *decoder.latent_shape, generator=draws) for _ in range(3))
    sigma = torch.tensor([0.6])
    noisy = torch.cat([latents + 0.6 * (noise - latents), reference], dim=-1)
    counts = torch.tensor([9, 8])
    keys = caption_keys(decoder.sana, decoder.unconditional(32, edit=True), counts)
    v = velocity(decoder.sana, noisy, sigma, [keys])[..., :4]
    wanted = (v - (noise - latents)).square().mean()
    dropped = decoder.flow_loss(hidden, latents, sigma, noise, torch.tensor([True]), reference)
    torch.testing.assert_close(dropped, wanted, rtol=1e-5, atol=1e-5)
    assert decoder.reference_connector is not None
    zeros = torch.zeros(1, 8, 4)
    assert decoder.reference_connector(zeros).abs().max() > 0.1
    kept = decoder.flow_loss(hidden, latents, sigma, noise, torch.tensor([False]), reference)
    assert (kept - wanted).abs() > 1e-4


def test_references_come_as_files_or_tensors(policy: ImagePolicy) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    files = policy.reference_of([Image.fromarray(picture) for picture in pixels])
    for one, other in zip(files, policy.reference_of(tensor), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert files[0].shape == (2, policy.num_actions) and files[1].shape == (2, *policy.latent_shape)
    torch.testing.assert_close(files[1], policy.decoder.encode(tensor))


def test_a_tokenizer_of_another_size_sees_the_same_picture() -> None:
    policy, _ = edit_policy()
    assert policy.image_tokenizer is not None
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 32, 64)
    seen: list[Tensor] = []
    policy.image_tokenizer.picture_size = (16, 32)
    policy.image_tokenizer.encode = lambda pictures: seen.append(pictures)  # type: ignore[assignment,return-value]
    policy.reference_of(smooth)
    picture = ((smooth[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    policy.reference_of([Image.fromarray(picture)])
    assert seen[0].shape == seen[1].shape == (1, 3, 16, 32)
    assert (seen[0] - seen[1]).abs().max() < 0.02


def test_an_edit_model_survives_its_folder(
    edit_model: tuple[ImagePolicy, dict[str, Any]], pictures: Tensor, tmp_path: Path
) -> None:
    policy, config = edit_model
    save_policy(policy, tmp_path, config)
    stored = read_weights(tmp_path)
    assert stored["model.und_image_vae_connector.0.weight"].shape == (24, 4)
    assert stored["model.und_image_vae_as_noise_connector.0.weight"].shape == (4, 8, 1, 1)
    again, _ = load_policy(str(tmp_path))
    for one, other in zip(edited(policy, pictures, [0]), edited(again, pictures, [0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda policy: policy.reference_of(torch.zeros(1, 3, 32, 64)),
        lambda policy: decode(
            policy, torch.zeros(1, 9, 32), torch.zeros(1, 4, 2, 4), 2.0, 1, torch.zeros(1, 4, 2, 4)
        ),
    ],
)
def test_a_model_without_the_edit_half_refuses(attempt: object) -> None:
    with pytest.raises(ImageRLError, match="trained to edit"):
        attempt(micro_policy()[0])  # type: ignore[operator]
