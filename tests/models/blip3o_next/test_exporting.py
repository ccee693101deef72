"""What others get: exactly the published keys, a Qwen3 that transformers loads, a pipeline that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagerl.models.blip3o_next.exporting import (
    load_diffusers,
    load_language_model,
    save_diffusers,
    save_language_model,
    save_published,
)
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import VISION_TOWER
from imagerl.models.blip3o_next.weights import full_state
from imagerl.models.common.shards import INDEX, Shards
from tests.micro import micro_folder, micro_policy
from tests.models.helpers import CAPTIONS, add_lively_lora, decode, load_policy, random_tokens, stir
from tests.parity import fixture
from tests.published import published_state, write_published


@pytest.fixture
def lively(tmp_path: Path) -> tuple[ImagePolicy, dict[str, object], Path]:
    """A policy that no fresh one resembles, its config, and the folder that it is said to come from."""
    policy, config = micro_policy(tie_word_embeddings=False)
    for part in (policy.trainable, policy.decoder.connector, policy.decoder.sana):
        stir(part)
    return policy, config, micro_folder(tmp_path / "base")


@pytest.mark.parametrize("variant", ["t2i", "edit"])
def test_a_published_export_has_every_key_shape_and_field(tmp_path: Path, variant: str) -> None:
    base = write_published(tmp_path / "base", variant, dtype=torch.bfloat16)
    policy, config = load_policy(str(base))
    policy.trainable.lm.model.norm.weight.data.fill_(2.0)  # training
    out = tmp_path / "out"
    out.mkdir()
    save_published(policy, out, config, base, torch.bfloat16, max_shard_bytes=2_000_000)
    assert Shards(out).shapes == fixture(variant).shapes and (out / INDEX).is_file()
    assert {entry.dtype for entry in Shards(out).entries.values()} == {torch.bfloat16}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert after["architectures"] == ["blip3oQwenForCausalLM"] and after["model_type"] == "blip3o_qwen"
    assert {key: after[key] for key in before if key != "imagerl"} == {
        key: value for key, value in before.items() if key != "imagerl"
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    again, _ = load_policy(str(out))
    trained, loaded = full_state(policy), full_state(again)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_tensors_that_no_part_holds_are_passed_on(tmp_path: Path) -> None:
    extra = {"model.novelty.weight": torch.tensor([1.5, 2.5]), "lm_head.weight": torch.zeros(361, 64)}
    state = published_state() | extra
    base = write_published(tmp_path / "base", state=state, tie_word_embeddings=True)
    policy, config = load_policy(str(base))
    (tmp_path / "out").mkdir()
    save_published(policy, tmp_path / "out", config, base)
    stored = Shards(tmp_path / "out")
    assert torch.equal(stored.read("model.novelty.weight"), extra["model.novelty.weight"])
    assert stored.entries.keys() == state.keys() - {"lm_head.weight"}  # stale: the head is tied


def test_our_own_models_go_out_in_the_published_layout(
    tmp_path: Path, lively: tuple[ImagePolicy, dict[str, object], Path]
) -> None:
    policy, config, base = lively
    save_published(policy, tmp_path, config, base)
    keys = Shards(tmp_path).entries.keys()
    assert not [key for key in keys if key.startswith(("image_tokenizer.", VISION_TOWER))]
    again, found = load_policy(str(tmp_path))
    assert {key: found[key] for key in ("sana", "vae", "latent_size")} == {
        key: config[key] for key in ("sana", "vae", "latent_size")
    }
    assert found["sampling"] == {"temperature": 1.0, **config["sampling"]}
    mine, stored = full_state(policy), full_state(again)
    assert all(torch.equal(mine[name], stored[name]) for name in stored) and again.image_tokenizer is None
    assert torch.equal(again.encode_prompts(CAPTIONS)[0], policy.encode_prompts(CAPTIONS)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_language_model(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoTokenizer

    policy, config = micro_policy(
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    stir(policy.trainable)
    add_lively_lora(policy)
    policy.trainable.adapter.merge_adapter()
    save_language_model(policy, tmp_path, config)
    ids, mask = policy.encode_prompts(CAPTIONS)
    with torch.no_grad():
        ours = policy.trainable.lm(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(load_language_model(tmp_path)(ids, mask), ours)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["rope_theta"] == 5e5 and config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in Shards(tmp_path).entries) is not tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(CAPTIONS[1])["input_ids"] == policy.text_tokenizer(CAPTIONS[1])["input_ids"]
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast" and stored["chat_template"]


def test_diffusers_loads_the_decoder_and_its_pipeline_draws_the_same(
    tmp_path: Path, lively: tuple[ImagePolicy, dict[str, object], Path]
) -> None:
    from diffusers import SanaPipeline

    policy, _, _ = lively
    save_diffusers(policy, tmp_path)
    ids, mask = policy.encode_prompts(CAPTIONS[:2])
    hidden = policy.trainable.hidden_states(ids, mask, random_tokens(policy, 2)).detach()
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    wanted = decode(policy, hidden, noise, 2.0, 3)
    decoder = load_diffusers(tmp_path, hidden.shape[-1], policy.latent_shape[1:])
    assert torch.equal(decoder.draw(decoder.latents(hidden, noise, 2.0, 3)), wanted)

    pipeline = SanaPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    captions, empty = policy.decoder.connector(hidden), policy.decoder.connector(torch.zeros_like(hidden))
    everywhere = torch.ones(captions.shape[:2])
    drawn = pipeline(
        prompt_embeds=captions,
        prompt_attention_mask=everywhere,
        negative_prompt_embeds=empty,
        negative_prompt_attention_mask=everywhere,
        negative_prompt=None,
        latents=noise,
        guidance_scale=2.0,
        sigmas=torch.linspace(1, 1 / 3, 3).tolist(),
        num_inference_steps=3,
        height=32,
        width=64,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    assert torch.allclose(drawn, wanted, atol=1e-5)


def test_an_edit_decoder_brings_both_connectors(tmp_path: Path) -> None:
    base = write_published(tmp_path / "base", "edit")
    policy, _ = load_policy(str(base))
    save_diffusers(policy, tmp_path / "out", torch.bfloat16)
    stored = load_file(tmp_path / "out" / "reference_connector.safetensors")
    assert stored.keys() == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}
    decoder = load_diffusers(tmp_path / "out", 64, (32, 32))
    ours = policy.decoder.reference_connector.state_dict()
    assert all(
        torch.equal(t, ours[n].bfloat16().float())
        for n, t in decoder.reference_connector.state_dict().items()
    )
