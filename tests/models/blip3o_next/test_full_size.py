"""The published 3B model in our classes, without weights: its shapes and its numbers of parameters.

The figures are those that the stock models' own pages print."""

from __future__ import annotations

import math

import pytest
from torch import nn

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import IMAGE_TOKENS, full_size_config
from imagerl.models.blip3o_next.weights import empty_policy, slots
from tests.parity import fixture

QWEN3_VOCABULARY = 151936
GB = 1e9


@pytest.fixture(scope="module")
def full() -> ImagePolicy:
    return empty_policy(full_size_config(edit=True), None)


def count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def test_nothing_is_allocated(full: ImagePolicy) -> None:
    assert all(getattr(*slot).is_meta for name, slot in slots(full).items() if "scale_layer" not in name)


def test_the_language_model_is_qwen3_1_7b_with_image_tokens(full: ImagePolicy) -> None:
    lm = full.trainable.lm
    embedding = lm.model.embed_tokens.weight
    added = 2 + 3 + 65536
    assert embedding.shape == (151669 + added, 2048)  # the text tokenizer's entries; Qwen3 pads its own table
    assert lm.lm_head.weight is embedding
    others = count(lm) - embedding.numel()
    assert f"{others / GB:.1f}B" == "1.4B"  # without the embedding
    assert f"{(others + QWEN3_VOCABULARY * 2048) / GB:.1f}B" == "1.7B"
    assert (
        f"{(others + 2 * QWEN3_VOCABULARY * 2048) / GB:.2f}B" == "2.03B"
    )  # as stored, head and embedding apart
    assert IMAGE_TOKENS.image_end_token_id + 1 == len(embedding)
    assert full.trainable.head.shape == (65536, 2048)


def test_the_decoder_is_sana_1_5_with_its_autoencoder(full: ImagePolicy) -> None:
    sana, vae = count(full.decoder.sana), count(full.decoder.vae)
    assert f"{sana / GB:.1f}B" == "1.6B"
    assert f"{4 * vae / GB:.2f} GB" == "1.25 GB"  # dc-ae-f32c32-sana's file, in float32
    text_encoder, tokenizer = 4.99 + 0.241, 0.039
    assert f"{2 * sana / GB + 4 * vae / GB + text_encoder + tokenizer:.2f}" == "9.73"  # the whole repository
    assert full.decoder.picture_size == (1024, 1024) and full.latent_shape == (32, 32, 32)
    assert full.decoder.connector[0].weight.shape == (2304, 2048)
    assert full.decoder.reference_connector[0].weight.shape == (2304, 32)


def test_the_vision_tower_is_siglip2_so400m(full: ImagePolicy) -> None:
    tokenizer = full.image_tokenizer
    assert f"{count(tokenizer.encoder) / 1e6:.1f}M" == "428.2M"
    assert tokenizer.num_tokens == full.num_actions == 27 * 27
    assert tokenizer.num_codes == full.vocabulary.num_image_tokens


def test_the_layout_has_no_part_that_small_ones_lack(full: ImagePolicy) -> None:
    """Names of the full model's tensors, layer numbers and decoder blocks aside, are those of the fixture."""

    def pattern(name: str) -> str:
        return ".".join("#" if part.isdigit() else part for part in name.split("."))

    known = {pattern(name) for name in fixture("edit").shapes}
    new = {pattern(name) for name in slots(full)} - known
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in new}
    assert parts == {"norm_q", "norm_k", "conv_in"}  # norms of SANA 1.5; an encoder that begins with blocks
    assert (
        len(slots(full)) > 1500
        and sum(math.prod(getattr(*slot).shape) for slot in slots(full).values()) > 4e9
    )
