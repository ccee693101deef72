"""Published checkpoints: whatever layout, whatever is wrong with them."""

from __future__ import annotations

import fnmatch
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.loading import save_policy
from imagerl.models.blip3o_next.published import STOCK, TA_TOK, from_published, full_size_config, to_published
from imagerl.models.blip3o_next.weights import full_state
from imagerl.models.common import hub
from imagerl.models.common.shards import INDEX, WEIGHTS, Shards
from imagerl.rl.types import ImageRLError
from tests.micro import micro_policy
from tests.models.helpers import decode, load_policy, random_tokens, stir
from tests.parity import fixture
from tests.published import published_config, published_state, write_published

TOWER, EDIT = "model.vision_tower.", "model.und_image_vae_connector."
UNUSED = "model.und_image_vae_as_noise_connector."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text-to-image checkpoint, in shards of 2 MB."""
    return write_published(tmp_path_factory.mktemp("published") / "t2i", max_bytes=2_000_000)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ImageRLError, match=match) as caught:
        load_policy(str(folder))
    assert "\n" not in str(caught.value)


def holds(policy: Any, state: dict[str, Tensor]) -> bool:
    loaded = full_state(policy)
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


# ---- whole checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2i", "edit"])
def test_every_published_tensor_finds_its_place(
    tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = published_state(variant)
    policy, config = load_policy(str(write_published(tmp_path / variant, variant)))
    assert holds(policy, state)
    assert (policy.decoder.reference_connector is not None) == (variant == "edit")
    assert config["num_image_positions"] == policy.num_actions == 729
    assert policy.latent_shape == (32, 32, 32)
    assert not caplog.records


def test_shards_hold_the_same_as_one_file(whole: Path, tmp_path: Path) -> None:
    assert len(list(whole.glob("*.safetensors"))) > 3 and not (whole / WEIGHTS).exists()
    single, sharded = Shards(write_published(tmp_path / "one")), Shards(whole)
    assert single.shapes == sharded.shapes == fixture("t2i").shapes
    for name in single.in_order():
        assert torch.equal(single.read(name), sharded.read(name))


def test_tied_and_separate_heads(tmp_path: Path) -> None:
    state = published_state()
    tied, _ = load_policy(str(write_published(tmp_path / "tied", state=without(state, "lm_head"))))
    lm = tied.trainable.lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert torch.equal(lm.lm_head.weight, state["model.embed_tokens.weight"])
    separate, _ = load_policy(str(write_published(tmp_path / "separate", state=state)))
    assert torch.equal(separate.trainable.lm.lm_head.weight, state["lm_head.weight"])


def test_a_stored_head_that_config_ties_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the public code, where transformers ties it after loading."""
    state = published_state()
    policy, _ = load_policy(str(write_published(tmp_path / "m", state=state, tie_word_embeddings=True)))
    assert torch.equal(policy.trainable.lm.lm_head.weight, state["model.embed_tokens.weight"])
    assert "lm_head.weight is not used" in caplog.text


def test_a_missing_vision_tower_or_edit_connector_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = without(published_state("edit"), TOWER, EDIT, UNUSED)
    policy, _ = load_policy(str(write_published(tmp_path / "m", "edit", state)))
    assert policy.image_tokenizer is None and policy.decoder.reference_connector is None
    assert "no vision tower" in caplog.text and "no edit connector" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_tensors_that_nothing_reads_do_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = published_state("edit")
    lacking, _ = load_policy(str(write_published(tmp_path / "less", "edit", without(state, UNUSED))))
    assert holds(lacking, without(state, UNUSED)) and not caplog.records
    more = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert holds(load_policy(str(write_published(tmp_path / "old", "edit", more)))[0], state)
    assert not caplog.records
    strange = state | {"model.novelty.weight": torch.ones(2), "model.novelty.bias": torch.ones(2)}
    assert holds(load_policy(str(write_published(tmp_path / "more", "edit", strange)))[0], state)
    assert "2 tensors such as model.novelty.bias belong to no part" in caplog.text


def test_bfloat16_storage_and_bfloat16_parts(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "m", dtype=torch.bfloat16)
    state = published_state()
    wide = full_state(load_policy(str(folder))[0])
    narrow = full_state(load_policy(str(folder), dtype=torch.bfloat16)[0])
    for name, tensor in state.items():
        assert wide[name].dtype == torch.float32 and narrow[name].dtype == torch.bfloat16
        assert torch.equal(wide[name], tensor.bfloat16().float()) and torch.equal(
            narrow[name], tensor.bfloat16()
        )


def test_a_policy_in_bfloat16_draws_nearly_the_same(tmp_path: Path) -> None:
    policy, config = micro_policy()
    for part in (policy.trainable, policy.decoder.connector, policy.decoder.sana):
        stir(part)
    save_policy(policy, tmp_path, config, torch.bfloat16)
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        policy, _ = load_policy(str(tmp_path), dtype=dtype)
        ids, mask = policy.encode_prompts(["a red sign", "a longer prompt"])
        hidden = policy.trainable.hidden_states(ids, mask, random_tokens(policy, 2)).detach()
        noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        drawn.append((hidden.float(), decode(policy, hidden, noise, 2.0, 2)))
    for one, other in zip(*drawn, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).abs().mean() < 0.02 * one.abs().mean()


# ---- damage ------------------------------------------------------------------------------------------------


def test_a_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    lost = sum(file == shard.name for file in json.loads((folder / INDEX).read_text())["weight_map"].values())
    shard.unlink()
    refused(folder, rf"lacks the shard {shard.name} with {lost} tensors")


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.0001, 0.0])
def test_a_shard_cut_short(folder: Path, kept: float) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept)])
    refused(folder, rf"{shard.name} is damaged or cut short .*copy it again")


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    shards = Shards(folder)
    name = list(shards.in_order())[-1]
    shards.entries[name].file.write_bytes(b"")
    with pytest.raises(ImageRLError, match="ends too early"):
        shards.read(name)


def test_an_index_of_another_checkpoint(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(folder.glob("model-*"))[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(
        folder, r"names 1 tensors such as model\.layers\.9\.mlp\.up_proj\.weight that are not in its files"
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "index.json is damaged"),
        ("[]", "index.json is damaged"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "outside the folder"),
    ],
)
def test_a_bad_index(folder: Path, text: str, match: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, match)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (90).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'.ljust(90),
        (90).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,0]}}'.ljust(90),
        (90).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4]}}'.ljust(90),
    ],
)
def test_a_forged_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(header + bytes(64))
    with pytest.raises(ImageRLError, match="damaged or cut short"):
        Shards(tmp_path)


def test_numbers_of_an_unknown_kind(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'.ljust(90)
    (tmp_path / WEIGHTS).write_bytes((90).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ImageRLError, match="F8_E4M3; convert"):
        Shards(tmp_path)


def test_pickles_alone(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, r"pytorch_model-00001-of-00002\.bin is a pickle and is not loaded")


def test_what_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    state = published_state()

    def changed(match: str, state: dict[str, Tensor], **config: Any) -> None:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        refused(write_published(tmp_path / "m", state=state, **config), match)

    layer = "model.layers.2."
    count = sum(name.startswith(layer) for name in state)
    changed(rf"{count} missing such as model\.layers\.2\.\S+ of the language model", without(state, layer))
    changed(r"missing such as model\.sana\.\S+ of the decoder", without(state, "model.sana."))
    changed(r"2 missing such as model\.sana_vae\.decoder\.conv_in\.bias of the autoencoder",
            without(state, "model.sana_vae.decoder.conv_in."))  # fmt: skip
    changed(r"unknown such as model\.layers\.3\.\S+ of the language model", state, num_hidden_layers=3)
    changed(r"embed_tokens\.weight is \(361, 64\), config\.json says \(400, 64\)", state, vocab_size=400)
    task = TOWER + "vision_tower.encode_task_layer."
    changed("2 missing such as .* of the vision tower", without(state, task))
    changed("vision tower lacks .*patch_embedding", without(state, TOWER + "vision_tower.encoder.embeddings."),
            imagerl={k: v for k, v in published_config()["imagerl"].items() if k != "ta_tok"})  # fmt: skip


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_image_tokens", "image_start_tag_id"])
def test_a_field_that_config_lacks(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, f"lacks {key}")


def test_a_plain_language_model_is_no_generator(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    plain = {k: v for k, v in config.items() if k not in ("diffusion_name_or_path", "imagerl")}
    (folder / "config.json").write_text(json.dumps(plain | {"architectures": ["Qwen3ForCausalLM"]}))
    refused(folder, r"type 'blip3o_qwen' that is of none of the families blip3o_next.*model\.family")


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    moved = {key: config[key] - 1 for key in ("scale_start_token_id", "scale_end_token_id")}
    (folder / "config.json").write_text(json.dumps(config | moved))
    refused(folder, r"<S0> is 102 in the tokenizer but 101 in config\.json")


# ---- sizes and fields --------------------------------------------------------------------------------------


def test_sizes_of_the_vision_tower_are_read_off_its_tensors() -> None:
    given = fixture("t2i").json
    flat = published_config()
    del flat["imagerl"]["ta_tok"]
    found = from_published(flat, fixture("t2i").shapes)["ta_tok"]
    assert found["decoder_depth"] == given["decoder_depth"]
    assert found["bottleneck"]["bottleneck_dim"] == given["bottleneck"]["bottleneck_dim"]
    wanted = {key: value for key, value in given["siglip"].items() if key in found["siglip"]}
    assert found["siglip"] == wanted | {"num_attention_heads": TA_TOK["siglip"]["num_attention_heads"]}


def test_without_our_key_the_stock_sizes_hold() -> None:
    flat = {key: value for key, value in published_config().items() if key != "imagerl"}
    nested = from_published(flat, {})
    assert {key: nested[key] for key in STOCK} == STOCK
    assert nested["qwen3"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert nested["qwen3"]["tie_word_embeddings"]  # there is no lm_head among no tensors


def test_a_config_goes_out_as_it_came_in() -> None:
    for variant in ("t2i", "edit"):
        flat = published_config(variant)
        nested = from_published(flat, fixture(variant).shapes)
        again = to_published(nested, "bfloat16")
        fields = {key: value for key, value in flat.items() if key != "imagerl"}
        assert again | fields == again  # every field and value of the original
        assert again["imagerl"].keys() < flat["imagerl"].keys()  # what is stock need not be said
        twice = from_published(again, fixture(variant).shapes)
        assert twice["qwen3"] | nested["qwen3"] == twice["qwen3"]
        aside = {"published": None, "qwen3": None}
        assert twice | aside == nested | aside
        assert set(again) - set(flat) <= set(to_published(full_size_config(variant == "edit"), "bfloat16"))


def test_a_stock_model_needs_no_key_of_ours() -> None:
    flat = to_published(full_size_config(edit=True), "bfloat16")
    assert "imagerl" not in flat
    assert flat["architectures"] == ["blip3oQwenForCausalLM"] and flat["use_und_image_vae"]
    assert "use_und_image_vae" not in to_published(full_size_config(), "bfloat16")


# ---- the hub -----------------------------------------------------------------------------------------------


def test_a_hub_name_fetches_weights_and_tokenizer_but_no_code(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Path(shutil.copytree(whole, tmp_path / "remote"))
    for name in ("modeling_evil.py", "pytorch_model.bin", "ta_tok.pth", "training_args.bin", "README.md"):
        (remote / name).write_bytes(b"x")
    calls = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision))
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    policy, _ = load_policy("BLIP3o/BLIP3o-NEXT-SFT-3B")
    assert holds(policy, published_state())
    load_policy("BLIP3o/BLIP3o-NEXT-SFT-3B@0123abc")
    assert calls == [("BLIP3o/BLIP3o-NEXT-SFT-3B", None), ("BLIP3o/BLIP3o-NEXT-SFT-3B", "0123abc")]
    assert {f.name for f in (tmp_path / "cache").iterdir()} == {f.name for f in whole.iterdir()}


def test_offline_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ImageRLError, match=r"no folder here, and fetching .* failed .*give its path"
    ) as caught:
        load_policy("nobody/no-such-model-anywhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./runs/x", "/abs/path", "runs/x/y", "runs", "../x", "~/x", "a b/c"])
def test_paths_are_no_hub_names(path: str) -> None:
    assert not hub.is_hub_name(path)
