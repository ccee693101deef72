from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagerl.models.blip3o_next.loading import full_state, save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.families import model_folder
from imagerl.rl.types import ImageRLError, SamplingParams
from tests.micro import micro_folder, micro_policy
from tests.models.helpers import CAPTIONS, add_lively_lora, decode, lively_policy, load_policy, stir, uniforms

WEIGHTS = "model.safetensors"


def drawn(policy: ImagePolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and pixels for fixed random numbers."""
    ids, mask = policy.encode_prompts(CAPTIONS)
    policy.refresh_sampler()
    trajectory = policy.sample_tokens({"ids": ids, "mask": mask}, uniforms(policy, 3), SamplingParams())
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return trajectory.tokens, decode(policy, trajectory.states["hidden"], noise, 2.0, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_folder(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_policy_draws_the_same(tmp_path: Path, tied: bool) -> None:
    policy, config = micro_policy(tie_word_embeddings=tied)
    for part in (policy.trainable, policy.decoder.connector, policy.decoder.sana):
        stir(part)
    save_policy(policy, tmp_path, config)
    loaded, read = load_policy(str(tmp_path))
    for before, after in zip(drawn(policy), drawn(loaded), strict=True):
        assert torch.equal(before, after)
    assert read["num_image_positions"] == loaded.num_actions
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    assert torch.equal(policy.image_tokenizer.encode(images), loaded.image_tokenizer.encode(images))
    assert policy.text_tokenizer.get_vocab() == loaded.text_tokenizer.get_vocab()


def test_only_the_language_model_trains_after_loading(saved: Path) -> None:
    policy, _ = load_policy(str(saved))
    assert all(p.requires_grad for p in policy.trainable.parameters())
    for frozen in (policy.decoder, policy.image_tokenizer):
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(m.training for part in (policy.trainable, policy.decoder) for m in part.modules())


def test_keys_follow_the_published_layout(saved: Path) -> None:
    keys = load_file(saved / WEIGHTS).keys()
    for key in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.norm.weight",
        "model.diffusion_connector.0.weight",
        "model.diffusion_connector.3.weight",
        "model.sana.caption_norm.weight",
        "image_tokenizer.encoder.0.weight",
    ):
        assert key in keys
    assert any(key.startswith("model.sana_vae.decoder.") for key in keys)


def test_a_tied_head_is_stored_once_and_an_untied_one_is_stored(tmp_path: Path, saved: Path) -> None:
    assert "lm_head.weight" not in load_file(saved / WEIGHTS)
    policy, _ = load_policy(str(saved))
    assert policy.trainable.lm.lm_head.weight is policy.trainable.lm.model.embed_tokens.weight
    untied = micro_folder(tmp_path / "untied", tie_word_embeddings=False)
    assert "lm_head.weight" in load_file(untied / WEIGHTS)


def test_bfloat16_storage_is_half_as_large_and_loads_as_float32(tmp_path: Path, saved: Path) -> None:
    policy, config = micro_policy()
    save_policy(policy, tmp_path, config, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    loaded, _ = load_policy(str(tmp_path))
    for name, tensor in full_state(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, full_state(policy)[name].bfloat16().float())


def test_the_autoencoders_measured_scale_is_kept(tmp_path: Path) -> None:
    policy, config = micro_policy()
    policy.decoder.vae.register_to_config(scaling_factor=0.75)
    save_policy(policy, tmp_path, config)
    assert load_policy(str(tmp_path))[0].decoder.scaling_factor == 0.75


def test_adapters_are_merged_when_a_whole_policy_is_saved(tmp_path: Path) -> None:
    policy, config = micro_policy()
    stir(policy.trainable)
    add_lively_lora(policy)
    save_policy(policy, tmp_path, config)
    assert not [key for key in load_file(tmp_path / WEIGHTS) if "lora" in key or "base_layer" in key]
    for before, after in zip(drawn(policy), drawn(load_policy(str(tmp_path))[0]), strict=True):
        assert torch.equal(before, after)


def test_an_adapter_folder_brings_its_base(tmp_path: Path) -> None:
    policy, config = micro_policy()
    stir(policy.trainable)
    (tmp_path / "base").mkdir()
    save_policy(policy, tmp_path / "base", config)
    plain = drawn(policy)
    add_lively_lora(policy)
    policy.save_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    loaded, _ = load_policy(str(tmp_path / "adapter"))
    for before, after in zip(drawn(policy), drawn(loaded), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(plain[0], drawn(loaded)[0])
    with loaded.trainable.base_weights():
        assert torch.equal(plain[0], drawn(loaded)[0])


def test_an_adapter_folder_holds_adapters_alone(tmp_path: Path) -> None:
    policy = lively_policy()
    add_lively_lora(policy)
    policy.save_adapter(tmp_path, "tiny")
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, saved: Path) -> None:
    policy = lively_policy()
    add_lively_lora(policy)
    adapter = tmp_path / "adapter"
    policy.save_adapter(adapter, str(micro_folder(tmp_path / "narrow", hidden_size=16)))

    def refused(match: str) -> None:
        with pytest.raises(ImageRLError, match=match) as caught:
            load_policy(str(adapter))
        assert "\n" not in str(caught.value)

    refused("does not fit its base model .*narrow: .*size mismatch")
    policy.save_adapter(adapter, str(saved))
    load_policy(str(adapter))
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file)
    refused("does not fit its base model .*: no .*lora_A")
    save_file({**weights, name.replace("layers.0", "layers.7"): weights[name].clone()}, file)
    refused("no layer for .*layers.7")
    file.write_bytes(file.read_bytes()[:100])
    refused("adapter_model.safetensors is damaged")
    file.unlink()
    refused("has no adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 10**9}, '"r" should be less than or equal to 16384'),
        ({"r": 0}, '"r" should be greater than'),
        ({"lora_alpha": None, "use_dora": True}, "has use_dora; merge it"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "has megatron_config"),
        ({"target_modules": 7}, "target_modules"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "has bias; merge it"),
        ({"base_model_name_or_path": None}, '"base_model_name_or_path" is missing'),
        ({"base_model_name_or_path": "."}, "leads back to the adapter itself"),
    ],
)
def test_adapter_settings_that_would_not_be_honoured_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], match: str
) -> None:
    policy = lively_policy()
    add_lively_lora(policy)
    policy.save_adapter(tmp_path, "tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageRLError, match=match) as caught:
        load_policy(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_folder() -> None:
    with pytest.raises(ImageRLError, match=r"'nowhere/at/all' is no folder.*\"?'?tiny"):
        load_policy("nowhere/at/all")


@pytest.mark.parametrize(
    ("file", "way"),
    [
        ("checkpoints/step_000010/state.json", "make a model of it with: imagerl export {folder} OUT"),
        ("optimizer.safetensors", "make a model of it with: imagerl export {folder} OUT"),
        ("model/config.json", "the model is in {folder}/model"),
        ("notes.txt", "give the folder of a model or of an export"),
    ],
)
def test_a_folder_of_something_else_says_the_way(tmp_path: Path, file: str, way: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ImageRLError, match=re.escape(way.format(folder=tmp_path))):
        load_policy(str(tmp_path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match=r"has no config\.json"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("text", ["{not json", "", "\x00", "null", "3", "[]"])
def test_a_config_that_is_no_mapping(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ImageRLError, match=r"config\.json"):
        load_policy(str(folder))


@pytest.mark.parametrize("key", ["qwen3", "scheduler", "num_image_positions", "image_start_token_id"])
def test_a_config_without_a_key_names_it(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImageRLError, match=key):
        load_policy(str(folder))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ImageRLError, match=rf"has no {WEIGHTS}$"):
        load_policy(str(folder))


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_named_and_never_loaded(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_policy(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ImageRLError, match=r"pytorch_model\.bin is a pickle"):
        load_policy(str(folder))


@pytest.mark.parametrize("kept", [0.9, 0.001, 0.0])
def test_weights_cut_short(folder: Path, kept: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ImageRLError, match="damaged or cut short"):
        load_policy(str(folder))


def test_weights_of_another_model_are_named(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"

    def refused(changed: dict[str, torch.Tensor], match: str) -> None:
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ImageRLError, match=match) as caught:
            load_policy(str(folder))
        assert "\n" not in str(caught.value)

    refused({**state, name: torch.zeros(48, 31)}, rf"{name} is \(48, 31\), config\.json says \(48, 32\)")
    refused({k: v for k, v in state.items() if k != name}, f"1 missing such as {name}")
    refused({**state, "model.extra": torch.zeros(1)}, r"1 unknown such as model\.extra")


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ImageRLError, match="no usable tokenizer"):
        load_policy(str(folder))


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code from a model folder was run')")
    load_policy(str(folder))


def test_the_shipped_model_is_small_and_whole() -> None:
    folder = model_folder("tiny")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 20e6
    policy, config = load_policy("tiny")
    tokens, pixels = drawn(policy)
    height, width = policy.image_tokenizer.config.image_size
    assert tokens.shape == (3, policy.num_actions) and pixels.shape == (3, 3, height, width)
    assert config["sampling"].keys() == {"guidance", "flow_steps", "temperature"}
    rows, columns = policy.image_tokenizer.config.grid
    assert policy.num_actions == rows * columns == config["num_image_positions"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000])
def test_names_that_the_system_refuses(name: str) -> None:
    with pytest.raises(ImageRLError, match="is no folder"):
        load_policy(name)
