"""Edits are what the library's pipeline makes of a picture and words: prompts, tokens, velocities, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imagerl.models.glm_image.family import GlmImage
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.rl.types import FlowSampling, ImageRLError, Prompt, Rows, SamplingParams
from tests.models.glm_image.small import PROMPTS, build_pipeline, saved

HEIGHT, WIDTH, STEPS = 64, 32, 2
SOURCES = [
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    for number in range(len(PROMPTS))
]
EDITS = [
    Prompt(number, text, {"height": HEIGHT, "width": WIDTH, "reference": source})
    for number, (text, source) in enumerate(zip(PROMPTS, SOURCES, strict=True))
]
GREEDY = SamplingParams(temperature=1e-4, guidance=1.5, flow_steps=STEPS)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_pipeline()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> GlmImagePolicy:
    return GlmImage().load(saved(tmp_path_factory.mktemp("glm_image")), "cpu", torch.float32)


@pytest.fixture(scope="module")
def rows(policy: GlmImagePolicy) -> Rows:
    return policy.encode(EDITS)


def written_by_the_library(pipe: Any) -> tuple[Tensor, Tensor]:
    """The tokens that the library's own generation writes of the edits in one batch, and those of the pictures.

    Its pipeline would ask for both by itself, but the one of diffusers 0.42 joins features of pictures as transformers
    5.23 no longer returns them, and fails."""
    content = [
        [{"type": "image", "image": source}, {"type": "text", "text": text}]
        for text, source in zip(PROMPTS, SOURCES, strict=True)
    ]
    settings = {"padding": True, "target_h": HEIGHT, "target_w": WIDTH, "return_tensors": "pt"}
    inputs = pipe.processor.apply_chat_template(
        [[{"role": "user", "content": each}] for each in content],
        tokenize=True,
        return_dict=True,
        processor_kwargs=settings,
    )
    model = pipe.vision_language_encoder
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    grids = inputs["image_grid_thw"][::2]
    features = model.get_image_features(inputs["pixel_values"], grids).pooler_output
    return tokens, model.get_image_tokens(features, grids).view(len(PROMPTS), -1)


def test_edits_are_the_librarys_from_words_to_pixels(policy: GlmImagePolicy, rows: Rows, pipe: Any) -> None:
    canvas = policy.prompts.canvas(EDITS[0])
    assert canvas.tokens == 2  # a row for each 32 pixels, and no preview
    trajectory = policy.sample_tokens(rows, torch.full((len(EDITS), canvas.tokens), 0.5), GREEDY)
    written, shown = written_by_the_library(pipe)
    assert torch.equal(trajectory.tokens, written)
    condition = policy.decoder.flow_condition(rows, trajectory)
    prior, source_prior = (
        torch.cat([pipe._upsample_token_ids(row, 2, 1) for row in tokens]) for tokens in (written, shown)
    )
    assert torch.equal(condition["prior"], prior) and torch.equal(rows["source_prior"], source_prior)
    assert len(shown.unique()) > 2
    noise = torch.randn(len(EDITS), *canvas.noise, generator=torch.Generator().manual_seed(1))
    ours = policy.decode(rows, trajectory, noise, GREEDY)
    for row, (text, source) in enumerate(zip(PROMPTS, SOURCES, strict=True)):  # it pads glyphs without a mask
        theirs = pipe(
            text,
            image=[source],
            prior_token_ids=prior[row : row + 1],
            prior_token_image_ids=[source_prior[row]],
            source_image_grid_thw=[torch.tensor([[1, 4, 2]])],
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GREEDY.guidance,
            latents=noise[row : row + 1],
            output_type="pt",
            return_dict=False,
        )[0]
        torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_the_picture_decides_tokens_and_pixels(policy: GlmImagePolicy, rows: Rows) -> None:
    other = policy.encode([Prompt(0, PROMPTS[0], {**EDITS[0].columns, "reference": SOURCES[1]})])
    assert not torch.equal(other["source_prior"][0], rows["source_prior"][0])
    mixed = {name: row[:1] for name, row in rows.items()} | {"source": other["source"]}
    trajectory = policy.sample_tokens(mixed, torch.full((1, 2), 0.5), GREEDY)
    noise = torch.zeros(1, *policy.prompts.canvas(EDITS[0]).noise)
    own, changed = (
        policy.decode({**mixed, "source": source}, trajectory, noise, GREEDY)
        for source in (rows["source"][:1], other["source"])
    )
    assert (own - changed).abs().max() > 1e-3


def test_scored_as_drawn_and_replayed_with_gradients(policy: GlmImagePolicy, rows: Rows) -> None:
    sampling = SamplingParams()
    trajectory = policy.sample_tokens(rows, torch.rand(2 * len(EDITS), 2, dtype=torch.float64), sampling)
    scores = policy.trainable(rows, trajectory.tokens, sampling)
    torch.testing.assert_close(scores.logprobs.detach(), trajectory.rollout_logprobs, rtol=0, atol=1e-5)
    flow, shape = policy.train_decoder(), policy.prompts.canvas(EDITS[0]).noise
    steps = FlowSampling("sde", 0.7, range(0, 1), 1.5, STEPS)
    draws = torch.Generator().manual_seed(2)
    noise, extra = (torch.randn(6, *lead, *shape, generator=draws) for lead in ((), (1,)))
    _, kept = flow.decode_steps(rows, trajectory, noise, extra, steps)
    schedule = flow.schedule(steps, shape)
    velocity = flow.trainable(kept.condition, kept.latents[:, :-1], schedule.sigma.expand(6, -1), 1.5)
    replayed = flow.score(velocity, kept.latents, schedule)
    torch.testing.assert_close(replayed.logprobs.detach(), kept.rollout_logprobs, rtol=0, atol=1e-5)
    (scores.logprobs.sum() + replayed.logprobs.sum()).backward()
    for half in (policy.trainable, flow.trainable):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in half.parameters())
    policy.flow = None


def test_captions_and_edits_are_not_drawn_together(policy: GlmImagePolicy) -> None:
    with pytest.raises(ImageRLError, match="1 of 2 prompts have a picture to edit"):
        policy.encode([EDITS[0], Prompt(1, "a cat", {"height": HEIGHT, "width": WIDTH})])
    ids = policy.prompts.encode(EDITS[:1])["input_ids"]
    assert policy.prompts.longest(EDITS[:1]) >= ids.shape[1]
