from __future__ import annotations

import pytest
import torch

from imagerl.models.blip3o_next.building import build_image_tokenizer
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.ta_tok import TATokenizer
from imagerl.models.common.image_tokenizer import FSQTokenizer
from imagerl.rl.data.tiny.world import DIGITS, LETTERS
from imagerl.rl.types import ImageRLError
from tests.micro import MODEL, micro_policy
from tools.tiny.model import build_text_tokenizer, new_policy


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return micro_policy()[0]


@pytest.mark.parametrize(
    "text",
    [
        "CAT 42",
        "Straße, 東京 и мир",
        "emoji 🦊👩‍🚀 é",
        "  two  spaces\n\ttab ",
        "quote \"and\" 'more'",
        "\x00\x7f",
    ],
)
def test_any_text_survives_the_tokenizer(policy: ImagePolicy, text: str) -> None:
    tokenizer = policy.text_tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < policy.vocabulary.image_start_tag_id


def test_capitals_digits_and_quotes_are_tokens_of_their_own(policy: ImagePolicy) -> None:
    tokenizer = policy.text_tokenizer

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert pieces('"ZEBRA"42') == list('"ZEBRA"42')
    assert pieces(LETTERS + DIGITS) == list(LETTERS + DIGITS)
    caption = pieces('a sign that says "CAB" in red')
    assert [piece for piece in caption if set(piece) & set(LETTERS + '"')] == ['"', "C", "A", "B", '"']
    assert len(caption) < len('a sign that says "CAB" in red')  # the rest is learned in larger pieces


def test_image_tokens_stand_at_the_end_in_the_published_order(policy: ImagePolicy) -> None:
    tokenizer, vocabulary = policy.text_tokenizer, policy.vocabulary
    codes = vocabulary.num_image_tokens
    wanted = [
        "<|vision_start|>",
        "<|vision_end|>",
        "<im_start>",
        "<im_end>",
        "<S0>",
        "<S1>",
        "<S2>",
        *(f"<I{i}>" for i in range(codes)),
    ]
    last = len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(range(last - len(wanted), last))) == wanted
    assert vocabulary.image_end_token_id == last - 1 == policy.trainable.lm.config.vocab_size - 1
    assert vocabulary.image_start_token_id == vocabulary.scale_end_token_id + 1
    assert [
        vocabulary.image_start_tag_id,
        vocabulary.image_end_tag_id,
        vocabulary.scale_start_token_id,
    ] == list(range(last - len(wanted) + 2, last - len(wanted) + 5))


def test_a_prompt_is_the_chat_template_and_ends_where_the_image_begins(policy: ImagePolicy) -> None:
    ids, mask = policy.encode_prompts(["a red CAT"])
    assert mask.all()
    assert policy.text_tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPlease generate image based on the following caption: a red CAT<|im_end|>\n"
        "<|im_start|>assistant\n<im_start><S0>"
    )
    assert ids[0, -2:].tolist() == [
        policy.vocabulary.image_start_tag_id,
        policy.vocabulary.scale_start_token_id,
    ]


def test_shorter_prompts_are_padded_on_the_left(policy: ImagePolicy) -> None:
    captions = ["CAT", "a much longer caption about a CAT"]
    ids, mask = policy.encode_prompts(captions)
    for row, caption in enumerate(captions):
        alone, _ = policy.encode_prompts([caption])
        length = alone.shape[1]
        assert torch.equal(ids[row, -length:], alone[0])
        assert mask[row].tolist() == [False] * (ids.shape[1] - length) + [True] * length
    assert ids[0, 0] == policy.text_tokenizer.pad_token_id


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_prompt_is_refused(policy: ImagePolicy, empty: str) -> None:
    with pytest.raises(ImageRLError, match="empty"):
        policy.encode_prompts(["CAT", empty])


def test_the_config_says_what_was_built(policy: ImagePolicy) -> None:
    _, config = micro_policy()
    assert config["num_image_positions"] == policy.num_actions == 8  # 2 × 4 patches of 16 × 16
    assert config["num_image_tokens"] == 16 == policy.image_tokenizer.num_codes
    assert policy.latent_shape == (4, 2, 4)
    assert MODEL["qwen3"].get("vocab_size") is None  # the recipe's own section is left alone


def test_building_is_repeatable() -> None:
    texts = ["one CAT", "two CATS"]
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(new_policy(MODEL, texts, 270)[0].trainable.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    vocabularies = [build_text_tokenizer(texts, 270, 4).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize("edit", [True, False])
def test_the_edit_half_is_there_when_asked_for(edit: bool) -> None:
    policy, config = new_policy({**MODEL, "edit": edit}, ["a sign"], 300)
    assert config["edit"] is edit
    parts = (policy.decoder.reference_connector, policy.decoder.unused_connector)
    assert [part is not None for part in parts] == [edit, edit]
    renewed = policy.renew_decoder()
    assert (renewed.reference_connector is not None) is edit


def test_a_config_names_its_image_tokenizer() -> None:
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    codebook = {"name": "simvq", "args": {"codebook_size": 8, "l2_normalized": True}}
    ta_tok = {"siglip": sizes, "bottleneck": {"bottleneck_dim": 4, "regularizer": codebook}}
    tokenizer = build_image_tokenizer({"ta_tok": ta_tok})
    assert isinstance(tokenizer, TATokenizer) and tokenizer.num_codes == 8 and tokenizer.num_tokens == 4
    assert isinstance(build_image_tokenizer(MODEL), FSQTokenizer)
    assert build_image_tokenizer({}) is None
