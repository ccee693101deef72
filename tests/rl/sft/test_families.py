"""Families other than BLIP3o-NEXT are fine-tuned by the same trainer, as far as they can learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imagerl.models.glm_image.family import GlmImage
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.data.seeding import generator
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.sft.objective import lessons_for
from imagerl.rl.types import ImageRLError, Prompt, SamplingParams, TokenTrajectory
from tests.command import call
from tests.models.glm_image.small import small_folder
from tests.models.janus_pro.small import policy_in, saved
from tests.small_sft import examples, recipe, small_trainer, write_pictures, write_recipe

TOKENS_ALONE = ("train={connector: frozen, decoder: frozen}", "objective={flow_weight: 0, on_prompt: false}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_pictures(folder)
    saved(folder / "model")
    return folder


@pytest.fixture
def policy(place: Path) -> JanusPolicy:
    return policy_in(place / "model")


@torch.no_grad()
def test_given_tokens_are_scored_as_drawn_ones_and_dropped_captions_as_guidance_has_them(
    place: Path, policy: JanusPolicy
) -> None:
    trainer = small_trainer(policy, recipe(place, *TOKENS_ALONE))
    batch = trainer.collate(examples(policy, place, 3), [generator("test", n) for n in range(3)], 0.5)
    batch.draws["drop"] = torch.tensor([False, True, False])
    assert "noise" not in batch.draws and batch.targets.keys() == {"tokens"}
    scores = trainer.module(*batch.inputs())
    given = policy.trainable(batch.prompts, batch.targets["tokens"], SamplingParams()).logprobs.sum(1)
    # guidance 0 leaves the unconditional distribution alone
    without = SamplingParams(token_guidance=0.0)
    bare = policy.trainable(batch.prompts, batch.targets["tokens"], without).logprobs.sum(1)
    torch.testing.assert_close(-scores.image_nll, torch.where(batch.draws["drop"], bare, given))
    assert (given - bare).abs().min() > 1e-3
    assert trainer.counted(batch).tolist() == [[16, 0]] * 3
    pixels = torch.from_numpy(examples(policy, place, 1)[0].picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(policy.tokens_of(pixels)[0], batch.targets["tokens"][0])


def test_glm_image_learns_tokens_and_velocities(place: Path, tmp_path: Path) -> None:
    """The flow loss of the most likely sample is that of the transformer told the picture's own tokens."""
    policy = GlmImage().load(small_folder(tmp_path), "cpu", torch.float32)
    settings = recipe(place, "train={connector: frozen, decoder: full}", "objective.on_prompt=false")
    trainer = small_trainer(policy, settings)
    canvas = policy.prompts.canvas(Prompt(0, ""))
    ones = examples(policy, place, 3)
    batch = trainer.collate(ones, [generator("test", n) for n in range(3)], 0.0)
    assert (
        batch.targets["tokens"].shape == (3, canvas.tokens)
        and trainer.counted(batch).sum() == 3 * canvas.tokens
    )
    assert len(batch.targets["tokens"].unique()) > 3
    with torch.no_grad():
        scores = trainer.module(*batch.inputs())
        decoder, latents, noise = policy.decoder, batch.targets["latents"], batch.draws["noise"]
        steps = decoder.scheduler.config.num_train_timesteps
        even = ((batch.draws["uniform"] * steps).floor() + 1) / steps
        sigma = decoder._shifted(even, latents.shape)
        assert torch.equal(decoder.timesteps(sigma, latents.shape), (even * steps).round() - 1)
        x = latents + sigma[:, None, None, None] * (noise - latents)
        tokens = TokenTrajectory(batch.targets["tokens"], torch.zeros(3), torch.zeros(3))
        seen = decoder.seen(decoder.flow_condition(batch.prompts, tokens), 1.0)
        wanted = (decoder.guided_velocity(x, sigma, seen, 1.0) - (noise - latents)).square().mean((1, 2, 3))
        torch.testing.assert_close(scores.flow, wanted)
        batch.draws["drop"][:] = True
        assert (trainer.module(*batch.inputs()).flow - wanted).abs().min() > 1e-4
    first = trainer.step(0)
    assert {"cross_entropy", "flow"} <= first.keys() and first["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "objective.flow_weight is above 0, but this model's decoder draws tokens without noise"),
        (("objective.flow_weight=0", TOKENS_ALONE[0]), "objective.on_prompt trains the prompt's own tokens"),
    ],
)
def test_what_it_cannot_learn_is_refused(
    place: Path, policy: JanusPolicy, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ImageRLError, match=message):
        lessons_for(policy, recipe(place, *settings))


def test_a_run_learns_and_leaves_a_model_that_draws(place: Path) -> None:
    settings = write_recipe(place, *TOKENS_ALONE, "train.ar=lora", "train.lora.r=4", "optim.lr=0.02")
    assert call("sft", str(settings)) == 0
    run = place / "run"
    first, *_, last = read_metrics(run)
    assert last["eval/heldout/cross_entropy"] < first["eval/heldout/cross_entropy"]
    assert "eval/heldout/flow" not in first
    assert (
        call("sample", "two cats", "--model", str(run / "model"), "-n", "1", "--out", str(place / "o")) == 0
    )
    assert (run / "samples" / "step_000006.png").is_file()
    assert call("export", str(run), str(place / "exported")) == 0
