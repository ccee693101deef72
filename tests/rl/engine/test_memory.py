"""Counting bytes on tensors without content."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from imagerl.models.blip3o_next.weights import empty_policy
from imagerl.rl.config.engine import LoraConfig
from imagerl.rl.engine.memory import LiveBytes, StepShape, at_depth, decoder_bytes, token_half_bytes
from tests.micro import MODEL, micro_policy
from tools.tiny.model import vocabulary_of

SHAPE = StepShape(
    sampled=2,
    group=3,
    pictures=4,
    prompt_tokens=20,
    image_tokens=8,
    micro_batch=3,
    share=1,
    guidance=2.0,
    token_guidance=1.0,
    noise=(4, 2, 4),
    sampler_dtype=torch.float32,
    storage=torch.float32,
    bf16=False,
)


def config(layers: int, decoder_layers: int = 2, tied: bool = True) -> dict[str, object]:
    """The micro model's, of another depth."""
    tokenizer = micro_policy()[0].text_tokenizer
    model = {key: copy.deepcopy(value) for key, value in MODEL.items() if key != "image_tokenizer"}
    model["qwen3"] |= {"num_hidden_layers": layers, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model["sana"] |= {"num_layers": decoder_layers}
    return {**model, **vocabulary_of(tokenizer, 16).to_config(), "num_image_positions": 8}


def test_storages_are_counted_once_and_while_they_live() -> None:
    given = torch.empty(1000)  # there before
    with LiveBytes() as memory:
        a = torch.empty(100)
        view = a[:50].view(5, 10)  # no memory of its own
        b = given.detach() + 1
        assert (memory.live, memory.peak) == (4400, 4400)
        del a
        assert memory.live == 4400
        del view, b
        assert (memory.live, memory.peak) == (0, 4400)
        c = torch.empty(10)
        memory.restart()
        assert (memory.live, memory.peak) == (40, 40)
        assert c is not None


def test_fake_tensors_cost_what_real_ones_would() -> None:
    def work() -> int:
        with LiveBytes() as memory:
            weight = torch.empty(64, 64, requires_grad=True)
            (torch.empty(8, 64) @ weight).relu().sum().backward()
        return memory.peak

    real = work()
    with FakeTensorMode():
        assert work() == real > 64 * 64 * 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8.0)])
def test_depth_is_a_straight_line(lora: LoraConfig | None) -> None:
    def language(layers: int) -> dict[str, float]:
        return token_half_bytes(empty_policy(config(layers), None), SHAPE, lora)

    direct, line = language(7), at_depth(language, 7)
    assert direct.keys() == line.keys()
    for name, value in direct.items():
        assert line[name] == pytest.approx(value, rel=0.01), name

    def decoder(layers: int) -> dict[str, float]:
        return decoder_bytes(empty_policy(config(2, layers), None), SHAPE)

    direct, line = decoder(7), at_depth(decoder, 7)
    for name, value in direct.items():
        assert line[name] == pytest.approx(value, rel=0.01), name


def test_parameters_are_counted() -> None:
    policy, _ = micro_policy()
    whole = sum(p.numel() for p in policy.trainable.parameters())
    costs = token_half_bytes(empty_policy(config(2), None), SHAPE)
    assert costs["weights"] == costs["trained"] == costs["trained_base"] == whole
    assert costs["gradients"] == 4 * whole
    assert costs["largest"] == max(p.numel() for p in policy.trainable.parameters())
    adapted = token_half_bytes(empty_policy(config(2), None), SHAPE, LoraConfig(r=4, alpha=8.0))
    policy.add_lora(4, 8.0, 0.0, "all-linear")
    adapters = sum(p.numel() for p in policy.trainable.parameters() if p.requires_grad)
    assert (adapted["weights"], adapted["trained"], adapted["trained_base"]) == (whole, adapters, 0)
    frozen = token_half_bytes(empty_policy(config(2), None), SHAPE, None, ["*embed_tokens*"])
    assert frozen["trained"] == whole - policy.trainable.lm.model.embed_tokens.weight.numel()
    decoder = decoder_bytes(empty_policy(config(2), None), SHAPE)
    assert decoder["part autoencoder"] == sum(p.numel() for p in policy.decoder.vae.parameters())
    counts = (decoder["part connector and decoder"], decoder["part autoencoder"])
    assert sum(counts) == sum(p.numel() for p in policy.decoder.parameters())


@pytest.mark.slow
def test_recomputing_layers_leaves_one_at_a_time() -> None:
    layers = 12
    plain, recomputed = (
        token_half_bytes(empty_policy(config(layers), None), replace(SHAPE, recompute=recompute))
        for recompute in (False, True)
    )
    activations = [cost["update_first"] - cost["gradients"] for cost in (plain, recomputed)]
    assert activations[1] < 0.4 * activations[0]
    assert plain["reference"] == recomputed["reference"]


def test_keys_and_values() -> None:
    policy = empty_policy(config(2), None)
    layers, heads, width, hidden, samples, tokens = 2, 2, 8, 32, 6, 8
    cache = 2 * layers * heads * width * 4
    assert policy.token_bytes() == (cache + 2 * hidden * 4, hidden * 4)
    costs = token_half_bytes(policy, SHAPE)
    assert costs["sampling"] > cache * samples * tokens
    assert costs["hidden"] == samples * (tokens + 1) * hidden * 4
