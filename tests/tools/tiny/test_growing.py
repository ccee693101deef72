from __future__ import annotations

import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.types import ImageRLError
from tests.micro import micro_policy
from tests.models.helpers import decode, random_tokens, stir
from tools.tiny.model import grow, turns
from tools.tiny.samples import captions

CORPUS = turns(
    captions(0, 30), ["change the background to pink"] * 9, ["what is written?"] * 9, ["red", "RIVER"]
)


@pytest.fixture(scope="module")
def pair() -> tuple[ImagePolicy, ImagePolicy]:
    old, config = micro_policy()
    stir(old.trainable)
    stir(old.decoder.sana)
    old.decoder.vae.register_to_config(scaling_factor=0.5)
    new, new_config = grow(old, config, CORPUS, 340)
    assert new_config["edit"] and "edit" not in config
    new.trainable.eval()
    new.decoder.eval()
    return old, new


def test_the_corpus_holds_the_prompts_of_all_tasks() -> None:
    assert turns(["C"], ["I"], ["Q"], ["A"]) == [
        "system\nYou are a helpful assistant.",
        "user\nPlease generate image based on the following caption: C",
        "user\nPlease edit this image according to the following instruction: I.\n",
        "user\n\nQ",
        "assistant\nA",
    ]


def test_embeddings_follow_their_tokens(pair: tuple[ImagePolicy, ImagePolicy]) -> None:
    old, new = pair
    known, vocabulary = old.text_tokenizer.get_vocab(), new.text_tokenizer.get_vocab()
    before, after = (policy.trainable.lm.model.embed_tokens.weight for policy in pair)
    for token in ("<I0>", "<I15>", "<im_start>", "<S0>", "R", "7", "<|im_end|>"):
        assert torch.equal(after[vocabulary[token]], before[known[token]])
    assert known["<I0>"] != vocabulary["<I0>"]  # a larger text vocabulary moves the image tokens
    fresh = [token for token in vocabulary if token not in known]
    assert "Ġbackground" in fresh
    pieces = old.text_tokenizer(" background", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    torch.testing.assert_close(after[vocabulary["Ġbackground"]], before[pieces].mean(0))
    assert torch.equal(new.trainable.head, old.trainable.head)


@torch.no_grad()
def test_the_same_ids_draw_the_same_picture(pair: tuple[ImagePolicy, ImagePolicy]) -> None:
    """A prompt of single capitals is spelt alike by both tokenizers; from there on all is as before."""
    old, new = pair
    tokens = random_tokens(old, 2)
    hidden = []
    for policy in pair:
        spelt = [policy.text_tokenizer.get_vocab()[letter] for letter in "RIVER"]
        tags = [policy.vocabulary.image_start_tag_id, policy.vocabulary.scale_start_token_id]
        ids = torch.tensor([[*spelt, *tags]] * 2)
        hidden.append(policy.trainable.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool), tokens))
    torch.testing.assert_close(hidden[1], hidden[0])
    noise = torch.randn(2, *old.latent_shape, generator=torch.Generator().manual_seed(0))
    drawn = [decode(policy, hidden[0], noise, 2.0, 2) for policy in pair]
    torch.testing.assert_close(drawn[1], drawn[0])
    pictures = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(new.image_tokenizer.encode(pictures), old.image_tokenizer.encode(pictures))


def test_only_the_new_one_edits(pair: tuple[ImagePolicy, ImagePolicy]) -> None:
    old, new = pair
    pictures = torch.zeros(1, 3, 32, 64)
    tokens, latents = new.reference_of(pictures)
    assert tokens.shape == (1, 8) and latents.shape == (1, *new.latent_shape)
    with pytest.raises(ImageRLError, match="trained to edit"):
        old.reference_of(pictures)


def test_a_model_without_an_image_tokenizer_cannot_grow() -> None:
    policy, config = micro_policy()
    policy.image_tokenizer = None
    with pytest.raises(ImageRLError, match="without an image tokenizer"):
        grow(policy, config, CORPUS, 340)
