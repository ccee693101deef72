"""Counting bytes on tensors without content."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from imagerl.models.blip3o_next.outline import SizedModel
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.training.memory import LiveBytes, StepShape, step_bytes
from tests.micro import MODEL, micro_policy
from tests.small_run import recipe_data
from tools.tiny.model import vocabulary_of

SHAPE = StepShape(
    sampled=2, pictures=4, prompt_tokens=20, image_tokens=8, micro_batch=3, later=False, noise=(4, 2, 4)
)


def recipe(*overrides: str) -> Recipe:
    fixed = ("rollout.group_size=3", "rollout.guidance=2.0", "engine.micro_batch_size=3")
    return validate_recipe(Recipe, recipe_data(Path("x"), *fixed, *overrides), "test")


def config(layers: int) -> dict[str, object]:
    """The micro model's, of another depth."""
    tokenizer = micro_policy()[0].text_tokenizer
    model = {key: copy.deepcopy(value) for key, value in MODEL.items() if key != "image_tokenizer"}
    model["qwen3"] |= {"num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    return {**model, **vocabulary_of(tokenizer, 16).to_config(), "num_image_positions": 8}


def micro(layers: int) -> ImagePolicy:
    return SizedModel(config(layers)).policy()


@cache
def measured(layers: int, *overrides: str, shape: StepShape = SHAPE) -> dict[str, float]:
    return step_bytes(partial(micro, layers), recipe(*overrides), shape, {})


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


def test_parameters_are_counted() -> None:
    policy, _ = micro_policy()
    whole = sum(p.numel() for p in policy.trainable.parameters())
    costs = measured(2)
    assert costs["trained language model"] == costs["trained"] == costs["reference"] == whole
    assert costs["gradients"] == 4 * whole
    assert costs["largest"] == max(p.numel() for p in policy.trainable.parameters())
    adapted = measured(2, "model.lora={r: 4}")
    policy.add_lora(4, 8.0, 0.0, "all-linear")
    adapters = sum(p.numel() for p in policy.trainable.parameters() if p.requires_grad)
    assert adapted["trained"] == adapted["trained language model"] == adapters
    assert adapted["frozen language model"] == whole and "reference" not in adapted
    frozen = measured(2, "model.freeze=['*embed_tokens*']")
    assert frozen["trained"] == whole - policy.trainable.lm.model.embed_tokens.weight.numel()
    assert costs["frozen autoencoder"] == sum(p.numel() for p in policy.decoder.vae.parameters())
    counts = (costs["frozen connector and decoder"], costs["frozen autoencoder"])
    assert sum(counts) == sum(p.numel() for p in policy.decoder.parameters())


@pytest.mark.slow
def test_a_decoder_that_trains_is_measured_at_all_its_points() -> None:
    """Activations grow by the point; a joint step holds those of both halves."""
    flow = "algorithm.flow={name: nft, points: %d, joint: %s}"
    settings = ("rollout.guidance=1.0", "algorithm.kl_coef=0")
    one, three = (measured(2, *settings, flow % (n, "false")) for n in (1, 3))
    decoder = micro(2).decoder
    network = sum(p.numel() for name in decoder.trained for p in getattr(decoder, name).parameters())
    assert one["trained"] == one["trained connector and decoder"] == network and "trained language" not in one
    assert one["trained language model"] == 0 and one["gradients"] == 4 * network
    activations = [cost["update"] - cost["gradients"] for cost in (one, three)]
    assert activations[1] > 2 * activations[0] > 0
    both = measured(2, *settings, flow % (3, "true"))
    tokens = measured(2, *settings)
    assert both["trained"] == tokens["trained"] + network
    assert both["update"] > three["update"] + 0.5 * (tokens["update"] - tokens["gradients"])


def test_gradients_of_earlier_passes_are_there_all_the_time() -> None:
    first, later = measured(2), measured(2, shape=replace(SHAPE, later=True))
    assert later["gradients"] == first["gradients"] < later["update"] - first["update"] + first["largest"] * 4
    assert later["drawing"] == first["drawing"]


@pytest.mark.slow
def test_recomputing_layers_leaves_one_at_a_time() -> None:
    plain, recomputed = (measured(6, f"engine.activation_checkpointing={on}") for on in (False, True))
    activations = [cost["update"] - cost["gradients"] for cost in (plain, recomputed)]
    assert activations[1] < 0.4 * activations[0]


def test_keys_and_values() -> None:
    policy = micro(2)
    layers, heads, width, hidden, samples, tokens = 2, 2, 8, 32, 6, 8
    cache = 2 * layers * heads * width * 4
    assert policy.token_bytes() == (cache + 2 * hidden * 4, hidden * 4)
    costs = measured(2)
    assert costs["sampling"] > cache * samples * tokens
    assert costs["hidden"] == samples * (tokens + 1) * hidden * 4


def test_a_mask_without_content_is_taken_to_choose_all() -> None:
    with FakeTensorMode(), LiveBytes() as memory:
        rows, mask = torch.empty(3, 4, 8), torch.empty(3, 4, dtype=torch.bool)
        chosen = rows[mask]
        rows[mask] = 0.0
        assert chosen.shape == (12, 8) and memory.live >= 2 * rows.nbytes
