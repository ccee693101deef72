"""Transformers' own model is the oracle: what it computes of a folder, ours computes of the same folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from imagerl.models.common.tokens import draw_tokens, guided_logits
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.types import SamplingParams, TokenTrajectory
from tests.models.janus_pro.small import CAPTIONS, PROMPTS, build, policy_in, saved, their_inputs, uniforms

GUIDED = SamplingParams(temperature=1.3, token_guidance=5.0)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@dataclass(frozen=True, slots=True)
class Generated:
    """What the library generated: tokens, and of every step both branches' hidden states and logits."""

    tokens: Tensor  # [B, T]
    hidden: Tensor  # [2·B, T, D]
    logits: Tensor  # [2·B, T, V]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def library() -> tuple[Any, Any]:
    return build()


@pytest.fixture(scope="module")
def policy(folder: Path) -> JanusPolicy:
    return policy_in(folder)


def generate(library: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, numbers: Tensor | None) -> Generated:
    """Let the library generate, greedily or by our numbers [B, T] in the place of its own."""
    model, processor = library
    hidden, logits = [], []

    def watch(_: Any, given: Any, result: Tensor) -> None:
        hidden.append(given[0])
        logits.append(result)

    def by_numbers(probabilities: Tensor, num_samples: int) -> Tensor:
        assert numbers is not None and num_samples == 1
        return draw_tokens(probabilities.log(), numbers[:, len(logits) - 1])[0][:, None]

    hook = model.model.generation_head.register_forward_hook(watch)
    drawn = {"do_sample": True, "top_k": 0, "temperature": GUIDED.temperature}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", by_numbers)
        tokens = model.generate(
            **their_inputs(processor),
            generation_mode="image",
            **(drawn if numbers is not None else {"do_sample": False}),
        )
    hook.remove()
    return Generated(tokens, torch.stack(hidden, 1), torch.stack(logits, 1))


@pytest.fixture(scope="module")
def theirs(library: tuple[Any, Any], policy: JanusPolicy) -> Generated:
    with pytest.MonkeyPatch.context() as patch:
        return generate(library, patch, uniforms(policy, len(CAPTIONS)))


@pytest.fixture(scope="module")
def ours(policy: JanusPolicy) -> TokenTrajectory:
    return policy.sample_tokens(policy.encode(PROMPTS), uniforms(policy, len(CAPTIONS)), GUIDED)


def test_prompts_are_those_of_the_librarys_processor(policy: JanusPolicy, library: tuple[Any, Any]) -> None:
    rows, inputs = policy.encode(PROMPTS), their_inputs(library[1])
    assert torch.equal(rows["ids"], inputs["input_ids"])
    assert torch.equal(rows["mask"], inputs["attention_mask"].bool())
    assert len(set(rows["mask"].sum(1).tolist())) == len(CAPTIONS)  # lengths differ, so padding is tried


def test_tokens_drawn_by_the_same_numbers_are_the_librarys(ours: TokenTrajectory, theirs: Generated) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    assert len(ours.tokens.unique()) > 10


def test_greedy_tokens_are_the_librarys(
    policy: JanusPolicy, library: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generate(library, monkeypatch, None).tokens
    greedy = SamplingParams(temperature=1e-4, token_guidance=5.0)
    drawn = policy.sample_tokens(policy.encode(PROMPTS), uniforms(policy, len(CAPTIONS)), greedy)
    assert torch.equal(drawn.tokens, wanted) and len(wanted.unique()) > 3


@torch.no_grad()
def test_hidden_states_and_guided_logits_are_the_librarys(policy: JanusPolicy, theirs: Generated) -> None:
    branches = policy.trainable.branches(policy.encode(PROMPTS), theirs.tokens[:, :-1], 5.0)
    assert_close(torch.cat(list(branches)), theirs.hidden)
    conditional, unconditional = theirs.logits.chunk(2)
    guided = guided_logits(policy.trainable.generation_head, branches, 5.0)
    assert_close(guided, unconditional + 5 * (conditional - unconditional))


@torch.no_grad()
def test_log_probs_are_the_librarys(policy: JanusPolicy, ours: TokenTrajectory, theirs: Generated) -> None:
    conditional, unconditional = theirs.logits.chunk(2)
    logits = (unconditional + 5 * (conditional - unconditional)) / GUIDED.temperature
    wanted = logits.log_softmax(-1).gather(-1, theirs.tokens[..., None])[..., 0]
    assert_close(ours.rollout_logprobs, wanted)
    assert_close(policy.trainable(policy.encode(PROMPTS), theirs.tokens, GUIDED).logprobs, wanted)


@torch.no_grad()
def test_pictures_are_the_librarys(
    policy: JanusPolicy, library: tuple[Any, Any], ours: TokenTrajectory
) -> None:
    model, processor = library
    wanted = model.decode_image_tokens(ours.tokens)
    pictures = policy.decode(policy.encode(PROMPTS), ours, None, GUIDED)
    assert_close(pictures, (wanted.permute(0, 3, 1, 2) * 0.5 + 0.5).clamp(0, 1))
    canvas = policy.prompts.canvas(PROMPTS[0])
    assert tuple(pictures.shape[-2:]) == canvas.pixels and canvas.noise is None
    arrays = [each.permute(2, 0, 1).numpy() for each in wanted]
    as_files = processor.postprocess(arrays, return_tensors="PIL.Image.Image")
    theirs = torch.tensor([list(picture.getdata()) for picture in as_files["pixel_values"]]) / 255
    gap = theirs.flatten(1) - pictures.permute(0, 2, 3, 1).flatten(1)
    assert gap.min() >= -1.001 / 255 and gap.max() <= 1e-5  # they cut off what does not fill a whole step


@torch.no_grad()
def test_tokens_of_a_picture_are_the_librarys(policy: JanusPolicy, library: tuple[Any, Any]) -> None:
    height, width = policy.prompts.canvas(PROMPTS[0]).pixels
    pictures = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = library[0].model.vqmodel.encode(pictures).image_tokens.view(2, -1)
    assert torch.equal(policy.tokens_of(pictures), wanted)
    assert len(wanted.unique()) > 3


def test_answers_are_the_librarys(policy: JanusPolicy, library: tuple[Any, Any]) -> None:
    model, processor = library
    colours = [Image.new("RGB", (9, 7), "red"), Image.new("RGB", (7, 9), "blue")]
    questions = ["what is this?", "which colour has the thing in the middle?"]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(text=texts, images=colours, padding=True, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    wanted = processor.tokenizer.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert policy.answer(colours, questions, 12) == [answer.strip() for answer in wanted]
    assert len(set(wanted)) == 2
