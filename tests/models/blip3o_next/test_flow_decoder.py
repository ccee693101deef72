from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next import flow_decoder
from imagerl.models.blip3o_next.flow_decoder import FlowDecoder, build_connector, caption_keys, velocity
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.types import ImageRLError
from tests.micro import MODEL
from tests.models.helpers import decode, lively_policy, stir

HIDDEN = 32


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    policy = lively_policy()
    stir(policy.decoder.connector)
    stir(policy.decoder.sana)
    return policy


@pytest.fixture(scope="module")
def decoder(policy: ImagePolicy) -> FlowDecoder:
    return policy.decoder


def inputs(decoder: FlowDecoder, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, latents and noise levels."""
    random_numbers = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, 9, HIDDEN, generator=random_numbers)
    latents = torch.randn(batch, *decoder.latent_shape, generator=random_numbers)
    return hidden, latents, torch.rand(batch, generator=random_numbers)


@torch.no_grad()
def by_diffusers(decoder: FlowDecoder, hidden: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of the transformer's own forward, given what the connector says."""
    return decoder.sana(latents, decoder.connector(hidden), sigma * 1000.0, return_dict=False)[0]


def test_velocity_is_that_of_the_diffusers_forward(decoder: FlowDecoder) -> None:
    hidden, latents, sigma = inputs(decoder)
    with torch.no_grad():
        velocity = decoder.velocity(latents, sigma, decoder.condition(hidden))
    wanted = by_diffusers(decoder, hidden, latents, sigma)
    assert torch.equal(velocity, wanted) and wanted.std() > 0.1
    other = by_diffusers(decoder, torch.zeros_like(hidden), latents, sigma)
    assert (other - wanted).abs().max() > 1e-3  # the condition matters here


def test_patches_larger_than_one_latent_fall_into_place() -> None:
    sana = {**MODEL["sana"], "patch_size": 2}
    decoder = FlowDecoder(HIDDEN, sana, MODEL["vae"], MODEL["scheduler"], (2, 4)).eval()
    stir(decoder.sana)
    hidden, latents, sigma = inputs(decoder)
    with torch.no_grad():
        velocity = decoder.velocity(latents, sigma, decoder.condition(hidden))
    assert torch.equal(velocity, by_diffusers(decoder, hidden, latents, sigma))


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_noise_levels_fall_evenly_from_one_to_zero(decoder: FlowDecoder, steps: int) -> None:
    wanted = torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)])
    torch.testing.assert_close(decoder.sigmas(steps), wanted)


def test_noise_levels_are_shifted_as_the_scheduler_says() -> None:
    decoder = FlowDecoder(HIDDEN, MODEL["sana"], MODEL["vae"], {**MODEL["scheduler"], "shift": 3.0}, (2, 4))
    plain = torch.linspace(1, 1 / 4, 4)
    torch.testing.assert_close(decoder.sigmas(4)[:-1], 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("guidance", [2.0, 1.0, 0.0])
def test_integration_is_that_of_the_diffusers_scheduler(decoder: FlowDecoder, guidance: float) -> None:
    """Both branches run separately here, by the library's forward, scheduler and own step function."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = 5
    hidden, noise, _ = inputs(decoder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(MODEL["scheduler"])
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    x = noise
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).expand(len(x))
        given = by_diffusers(decoder, hidden, x, sigma)
        without = by_diffusers(decoder, torch.zeros_like(hidden), x, sigma)
        x = scheduler.step(without + guidance * (given - without), timestep, x, return_dict=False)[0]
    drawn = decoder.latents(hidden, noise, guidance, steps)
    torch.testing.assert_close(drawn, x, rtol=1e-5, atol=1e-5)
    assert (drawn - noise).abs().mean() > 0.1


def test_guidance_one_runs_one_branch(decoder: FlowDecoder) -> None:
    hidden, noise, _ = inputs(decoder)
    batches: list[int] = []
    handle = decoder.sana.patch_embed.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    decoder.latents(hidden, noise, 1.0, 2)
    decoder.latents(hidden, noise, 2.0, 2)
    handle.remove()
    assert batches == [3, 3, 6, 6]


def test_captions_are_projected_once_per_picture_not_once_per_step(decoder: FlowDecoder) -> None:
    calls = []
    handle = decoder.sana.caption_projection.register_forward_hook(lambda *_: calls.append(1))
    hidden, noise, _ = inputs(decoder)
    decoder.latents(hidden, noise, 2.0, 7)
    handle.remove()
    assert len(calls) == 2  # the pictures', and the one unconditional row


def test_keys_and_values_are_computed_once_per_picture(decoder: FlowDecoder) -> None:
    rows: list[int] = []
    key = decoder.sana.transformer_blocks[0].attn2.to_k
    handle = key.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0] * args[0].shape[1]))
    hidden, noise, _ = inputs(decoder)
    decoder.latents(hidden, noise, 2.0, 7)
    handle.remove()
    assert sorted(rows) == [1, 3 * 9]


def test_one_row_with_a_count_stands_for_equal_rows(decoder: FlowDecoder) -> None:
    hidden, latents, sigma = inputs(decoder, batch=1)
    with torch.no_grad():
        condition = decoder.condition(hidden[:, :3])
        counts = torch.tensor([4.0, 1.0, 2.0])
        repeated = condition.repeat_interleave(counts.long(), dim=1)
        wanted = decoder.velocity(latents, sigma, repeated)
        short = velocity(decoder.sana, latents, sigma, [caption_keys(decoder.sana, condition, counts)])
        uncounted = decoder.velocity(latents, sigma, condition)
    torch.testing.assert_close(short, wanted, rtol=1e-5, atol=1e-5)
    assert (uncounted - wanted).abs().max() > 1e-3


def test_the_unconditional_branch_is_the_connector_of_zeros(decoder: FlowDecoder) -> None:
    hidden, latents, sigma = inputs(decoder)
    with torch.no_grad():
        without = decoder.unconditional(HIDDEN)
        every_row = decoder.condition(torch.zeros_like(hidden))
        one = velocity(decoder.sana, latents, sigma, [caption_keys(decoder.sana, without)])
        wanted = decoder.velocity(latents, sigma, every_row)
    torch.testing.assert_close(without.expand_as(every_row), every_row, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    assert without.abs().max() > 0.1  # zeros in, but by its biases not zeros out


def test_a_picture_depends_on_its_own_state_and_noise_alone(decoder: FlowDecoder) -> None:
    hidden, noise, _ = inputs(decoder, batch=4)
    together = decoder.latents(hidden, noise, 2.0, 3)
    for row in range(4):
        alone = decoder.latents(hidden[row : row + 1], noise[row : row + 1], 2.0, 3)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
    order = torch.tensor([3, 1, 0, 2])
    permuted = decoder.latents(hidden[order], noise[order], 2.0, 3)
    torch.testing.assert_close(permuted, together[order], rtol=1e-5, atol=1e-5)


def test_flow_loss_by_hand(decoder: FlowDecoder) -> None:
    hidden, latents, sigma = inputs(decoder)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    drop = torch.tensor([False, True, False])
    with torch.no_grad():
        loss = decoder.flow_loss(hidden, latents, sigma, noise, drop)
    total = 0.0
    for i in range(3):
        state = torch.zeros_like(hidden[i]) if drop[i] else hidden[i]
        noisy = (1 - sigma[i]) * latents[i] + sigma[i] * noise[i]
        velocity = by_diffusers(decoder, state[None], noisy[None], sigma[i : i + 1])[0]
        total += (velocity - noise[i] + latents[i]).square().sum().item()
    assert loss.item() == pytest.approx(total / latents.numel(), rel=1e-5)


def test_flow_loss_teaches_the_language_model_but_not_through_dropped_rows(policy: ImagePolicy) -> None:
    hidden, latents, sigma = inputs(policy.decoder)
    hidden.requires_grad_()
    drop = torch.tensor([False, True, False])
    policy.decoder.flow_loss(hidden, latents, sigma, torch.randn_like(latents), drop).backward()
    reached = hidden.grad.abs().amax((1, 2)) > 0
    assert reached.tolist() == [True, False, True]


def test_connector_has_the_published_layout() -> None:
    connector = build_connector(6, 10)
    shapes = {name: tuple(tensor.shape) for name, tensor in connector.state_dict().items()}
    assert shapes == {
        "0.weight": (10, 6),
        "0.bias": (10,),
        "2.weight": (10, 10),
        "2.bias": (10,),
        "3.weight": (10,),
    }
    stir(connector)
    x = torch.randn(4, 6)
    first = torch.nn.functional.gelu(x @ connector[0].weight.T + connector[0].bias, approximate="tanh")
    second = first @ connector[2].weight.T + connector[2].bias
    norm = (second.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(connector(x), second * norm * connector[3].weight)


def test_few_pictures_are_decoded_at_once(decoder: FlowDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, latents, _ = inputs(decoder, batch=5)
    whole, seen, decode = decoder.draw(latents), [], decoder.vae.decode
    monkeypatch.setattr(decoder.vae, "decode", lambda part: seen.append(len(part)) or decode(part))
    height, width = decoder.picture_size
    monkeypatch.setattr(flow_decoder, "MAX_PIXELS", 2 * height * width)
    torch.testing.assert_close(decoder.draw(latents), whole, rtol=0, atol=1e-6)
    assert seen == [2, 2, 1]


def test_pictures_are_decoded_at_the_autoencoders_scale(decoder: FlowDecoder) -> None:
    _, latents, _ = inputs(decoder)
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    decoder.vae.register_to_config(scaling_factor=0.5)
    try:
        with torch.no_grad():
            wanted = (decoder.vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
            encoded = decoder.vae.encode(pixels).latent * 0.5
        assert torch.equal(decoder.draw(latents), wanted)
        assert torch.equal(decoder.encode(pixels), encoded)
    finally:
        decoder.vae.register_to_config(scaling_factor=1.0)
    assert wanted.shape == (3, 3, 32, 64)


def test_noise_of_another_shape_is_refused(policy: ImagePolicy) -> None:
    hidden, _, _ = inputs(policy.decoder)
    with pytest.raises(ImageRLError, match=r"shape \(4, 3, 4\).*wants \(4, 2, 4\)"):
        decode(policy, hidden, torch.zeros(3, 4, 3, 4), 2.0, 2)
