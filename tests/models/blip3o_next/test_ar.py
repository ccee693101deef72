from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.ar import ImageVocabulary
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.common.adaptable import freeze
from imagerl.rl.types import ImageRLError, SamplingParams
from tests.models.helpers import CAPTIONS, add_lively_lora, lively_policy, random_tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return lively_policy()


@torch.no_grad()
def by_transformers(
    policy: ImagePolicy, caption: str, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] that predict the tokens, and their log-probs [T], from the plain causal model: a softmax
    over the whole vocabulary, renormalised over the image tokens. One caption, so no padding."""
    ids, _ = policy.encode_prompts([caption])
    start = policy.vocabulary.image_start_token_id
    out = policy.trainable.lm(torch.cat([ids[0], tokens + start])[None], output_hidden_states=True)
    before = slice(ids.shape[1] - 1, -1)
    everything = (out.logits[0, before].double() / temperature).softmax(-1)
    image = everything[:, start : start + policy.vocabulary.num_image_tokens]
    chosen = image.gather(-1, tokens[:, None])[:, 0] / image.sum(-1)
    return out.hidden_states[-1][0, before], chosen.log().float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_scores_are_those_of_transformers_over_image_tokens_even_left_padded(
    tied: bool, temperature: float
) -> None:
    policy = lively_policy(tie_word_embeddings=tied)
    ids, mask = policy.encode_prompts(CAPTIONS)
    assert not mask.all()
    tokens = random_tokens(policy, len(CAPTIONS))
    with torch.no_grad():
        scores = policy.trainable({"ids": ids, "mask": mask}, tokens, SamplingParams(temperature))
        hidden = policy.trainable.hidden_states(ids, mask, tokens)
    assert hidden.shape == (len(CAPTIONS), policy.num_actions + 1, 32)
    for row, caption in enumerate(CAPTIONS):
        states, logprobs = by_transformers(policy, caption, tokens[row], temperature)
        torch.testing.assert_close(hidden[row, :-1], states, **CLOSE)
        torch.testing.assert_close(scores.logprobs[row], logprobs, **CLOSE)
    assert scores.logprobs.dtype == torch.float32


def test_permuting_a_batch_permutes_its_scores(policy: ImagePolicy) -> None:
    ids, mask = policy.encode_prompts(CAPTIONS)
    tokens = random_tokens(policy, 3)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight = policy.trainable({"ids": ids, "mask": mask}, tokens, SamplingParams()).logprobs
        permuted = policy.trainable(
            {"ids": ids[order], "mask": mask[order]}, tokens[order], SamplingParams()
        ).logprobs
    torch.testing.assert_close(permuted, straight[order], **CLOSE)


def test_the_last_token_is_predicted_but_never_fed(policy: ImagePolicy) -> None:
    ids, mask = policy.encode_prompts(CAPTIONS)
    tokens = random_tokens(policy, 3)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % policy.vocabulary.num_image_tokens
    with torch.no_grad():
        one, two = (
            policy.trainable({"ids": ids, "mask": mask}, t, SamplingParams()) for t in (tokens, other)
        )
    assert torch.equal(one.entropy, two.entropy)
    assert torch.equal(one.logprobs[:, :-1], two.logprobs[:, :-1])
    assert not torch.isclose(one.logprobs[:, -1], two.logprobs[:, -1]).any()


def test_lora_starts_as_the_identity_and_its_base_stays_reachable() -> None:
    policy = lively_policy()
    ids, mask = policy.encode_prompts(CAPTIONS)
    arguments = ({"ids": ids, "mask": mask}, random_tokens(policy, 3), SamplingParams())
    with torch.no_grad():
        base = policy.trainable(*arguments).logprobs
        policy.trainable.add_lora(4, 8.0, 0.0, "all-linear")
        policy.trainable.eval()
        assert torch.equal(policy.trainable(*arguments).logprobs, base)
    policy = lively_policy()
    add_lively_lora(policy)
    policy.freeze_reference()
    with torch.no_grad():
        assert (policy.trainable(*arguments).logprobs - base).abs().max() > 0.01
        with policy.trainable.base_weights():
            assert torch.equal(policy.trainable(*arguments).logprobs, base)
    assert torch.equal(policy.reference_scores(*arguments).logprobs, base)


def test_with_lora_only_adapters_have_gradients() -> None:
    policy = lively_policy()
    policy.trainable.add_lora(4, 8.0, 0.0, ["q_proj", "down_proj"])
    ids, mask = policy.encode_prompts(CAPTIONS)
    policy.trainable(
        {"ids": ids, "mask": mask}, random_tokens(policy, 3), SamplingParams()
    ).logprobs.sum().backward()
    trained = {name for name, p in policy.trainable.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    moved = {name for name, p in policy.trainable.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in trained if "lora_B" in name}  # A's gradient is zero while B is


def test_a_frozen_reference_does_not_follow_the_policy() -> None:
    policy = lively_policy()
    ids, mask = policy.encode_prompts(CAPTIONS)
    arguments = ({"ids": ids, "mask": mask}, random_tokens(policy, 3), SamplingParams(0.8))
    with pytest.raises(ImageRLError, match="freeze_reference"):
        policy.reference_scores(*arguments)
    policy.freeze_reference()
    with torch.no_grad():
        before = policy.trainable(*arguments).logprobs
        for parameter in policy.trainable.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(policy.trainable(*arguments).logprobs, before)
    reference = policy.reference_scores(*arguments).logprobs
    assert torch.equal(reference, before) and not reference.requires_grad


def test_lora_refuses_layers_that_are_not_there() -> None:
    with pytest.raises(ImageRLError, match=r"model\.lora: .*no_such_layer"):
        lively_policy().trainable.add_lora(4, 8.0, 0.0, ["no_such_layer"])


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_lora_refuses_layers_whose_adapters_would_be_ignored(layer: str) -> None:
    with pytest.raises(ImageRLError, match=rf"target_modules: .*{layer}"):
        lively_policy(tie_word_embeddings=False).trainable.add_lora(4, 8.0, 0.0, ["q_proj", layer])


def test_vocabulary_comes_from_the_config_and_must_add_up(policy: ImagePolicy) -> None:
    config = policy.vocabulary.to_config()
    assert ImageVocabulary.from_config(config) == policy.vocabulary
    with pytest.raises(ImageRLError, match="image_end_tag_id"):
        ImageVocabulary.from_config({k: v for k, v in config.items() if k != "image_end_tag_id"})
    with pytest.raises(ImageRLError, match="num_image_tokens=17"):
        ImageVocabulary.from_config({**config, "num_image_tokens": 17})


def test_frozen_parameters_get_no_gradient_and_others_do() -> None:
    policy = lively_policy().trainable
    freeze(policy, ["*embed_tokens*", "lm.model.layers.0.*"])
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    assert "lm.model.embed_tokens.weight" in frozen and "lm.model.layers.0.mlp.up_proj.weight" in frozen
    assert all("embed_tokens" in name or ".layers.0." in name for name in frozen)
    with pytest.raises(ImageRLError, match=r"model.freeze: no parameter is named like 'embed'.*lm.model"):
        freeze(policy, ["embed"])
