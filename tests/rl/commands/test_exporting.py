"""From a run to a model folder: it draws what the run drew, or it is not written."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from safetensors.torch import load_file, save_file

from imagerl.api import exporting as export_module
from imagerl.api.drawing import loaded_rollout
from imagerl.api.exporting import PROVENANCE, proof_samples, recipe_of, trained_policy, write_export
from imagerl.models.blip3o_next import loading
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.common.shards import Shards
from imagerl.rl.config.sft import AnyRecipe
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.engine.checkpoint import load_checkpoint
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.suites import SUITES
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.rollout.preparing import evaluation_sampling
from imagerl.rl.types import SamplingParams
from tests.command import call
from tests.micro import micro_folder
from tests.models.helpers import load_policy
from tests.small_run import low_tokens, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run of two steps with full weights and one with LoRA, judged by the average of its weights."""
    folder = tmp_path_factory.mktemp("export")
    micro_folder(folder / "model")
    for name, given in (("full", ()), ("lora", ("model.lora={r: 4}", "optim.ema=0.5"))):
        overrides = (*given, f"run.output_dir={folder / name}", "run.steps=2", "checkpoint.every=1")
        assert call("train", str(write_recipe(folder, *overrides, "optim.lr=0.02"))) == 0
    return folder


def equal_samples(one: tuple[ImagePolicy, Any], other: tuple[ImagePolicy, Any]) -> bool:
    ours, theirs = proof_samples(one[0]), proof_samples(other[0])
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def trained(source: Path) -> tuple[ImagePolicy, AnyRecipe]:
    recipe, checkpoint = recipe_of(source)
    policy = trained_policy(recipe, checkpoint)
    assert isinstance(policy, ImagePolicy)
    return policy, recipe


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """The LoRA run, merged."""
    target = place / "exported"
    assert call("export", str(place / "lora"), str(target)) == 0
    return target


@pytest.mark.parametrize("run", ["full", "lora"])
def test_an_export_repeats_the_run(place: Path, tmp_path: Path, run: str) -> None:
    write_export(place / run, tmp_path / "out")
    loaded = load_policy(str(tmp_path / "out"))
    assert loaded[0].trainable.adapter is None
    assert equal_samples(loaded, trained(place / run))
    assert not equal_samples(loaded, load_policy(str(place / "model")))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        PROVENANCE,
    }
    assert not any(name.endswith((".bin", ".pt", ".py", ".pkl")) for name in names)


@pytest.mark.parametrize("run", ["full", "lora"])
def test_an_export_scores_what_the_run_measured(place: Path, tmp_path: Path, run: str) -> None:
    """Held to the run's own last evaluation, which knows nothing of exports."""
    write_export(place / run, tmp_path / "out")
    policy, _ = load_policy(str(tmp_path / "out"))
    rollout = RolloutEngine(policy, SamplingParams(flow_steps=1), 0, nullcontext)
    (groups,) = rollout.generate(prompt_set("heldout", 4), 1, "eval ocr")
    found = [low_tokens(group.tokens.tolist())[0] for group in groups]
    (measured,) = (json.loads(p.read_text()) for p in (place / run / "eval").glob("ocr_step_000002.json"))
    assert found == [row["low_tokens"] for row in measured["per_prompt"]]


def test_full_weights_are_those_of_the_checkpoint(place: Path, tmp_path: Path) -> None:
    provenance = write_export(place / "full" / "checkpoints" / "step_000001", tmp_path / "out")
    assert provenance["step"] == 1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(place / "model" / "model.safetensors")
    checkpoint = load_checkpoint(place / "full" / "checkpoints" / "step_000001").tensors["model"]
    for name, tensor in checkpoint.items():
        assert torch.equal(stored[name.removeprefix("lm.")], tensor)
    assert any(not torch.equal(stored[name], base[name]) for name in base)
    decoder = [name for name in base if name.startswith("model.sana")]
    assert decoder and all(torch.equal(stored[name], base[name]) for name in decoder)


def test_the_newest_checkpoint_is_taken(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [write_export(place / "full", tmp_path / "one")["step"]]
    steps += [write_export(place / "full" / "checkpoints", tmp_path / "two")["step"]]
    monkeypatch.chdir(place / "full" / "checkpoints")
    provenance = write_export(Path("step_000002"), tmp_path / "three")
    assert [*steps, provenance["step"]] == [2, 2, 2]
    assert provenance["metrics"]["eval/ocr/low_tokens"] >= 0


# ---- LoRA, storage types -----------------------------------------------------------------------------------


def test_an_adapter_folder_stands_on_its_base(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    assert call("export", str(place / "lora"), str(target), "--adapter") == 0
    assert {"adapter_config.json", "adapter_model.safetensors", PROVENANCE} <= {
        p.name for p in target.iterdir()
    }
    assert not (target / "model.safetensors").exists()
    loaded = load_policy(str(target))
    assert loaded[0].trainable.adapter is not None
    assert equal_samples(loaded, trained(place / "lora"))


def test_no_adapter_to_keep(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="no LoRA adapter"):
        write_export(place / "full", tmp_path / "out", adapter_only=True)
    assert not list(tmp_path.iterdir())


def test_bfloat16(place: Path, tmp_path: Path, exported: Path) -> None:
    assert call("export", str(place / "lora"), str(tmp_path / "out"), "--dtype", "bf16") == 0
    half, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", exported))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert load_policy(str(tmp_path / "out"))[0].trainable.lm.dtype == torch.float32


# ---- how it is drawn ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cold(place: Path) -> Path:
    """A LoRA run that samples colder, unguided, and is judged by two denoising steps."""
    options = ("rollout.temperature=0.5", "rollout.guidance=1", "rollout.flow_steps=1", "eval.flow_steps=2")
    recipe = write_recipe(
        place, *options, "model.lora={r: 4}", "run.steps=1", f"run.output_dir={place / 'cold'}"
    )
    assert call("train", str(recipe)) == 0
    return place / "cold"


@pytest.mark.parametrize("adapter_only", [False, True])
def test_an_export_draws_as_the_run_was_judged(cold: Path, tmp_path: Path, adapter_only: bool) -> None:
    """With no option given, `eval` repeats the run's last held-out evaluation, pictures included."""
    provenance = write_export(cold, tmp_path / "out", adapter_only=adapter_only)
    assert provenance["sampling"] == {"guidance": 1.0, "flow_steps": 2, "temperature": 0.5}
    assert load_policy(str(tmp_path / "out"))[1]["sampling"] == provenance["sampling"]
    (groups,) = (
        loaded_rollout(str(tmp_path / "out"), 0)
        .generate(prompt_set("heldout", 4), 1, "eval ocr")
    )  # fmt: skip
    policy, recipe = trained(cold)
    own = RolloutEngine(policy, evaluation_sampling(recipe), 0, nullcontext)
    (wanted,) = own.generate(prompt_set("heldout", 4), 1, "eval ocr")
    for group, other in zip(groups, wanted, strict=True):
        assert torch.equal(group.tokens, other.tokens) and np.array_equal(group.images, other.images)
    measured = json.loads((cold / "eval" / "ocr_step_000001.json").read_text())["per_prompt"]
    assert [low_tokens(g.tokens.tolist())[0] for g in groups] == [row["low_tokens"] for row in measured]


@pytest.mark.parametrize("layout", ["qwen3", "blip3o"])
def test_others_sample_at_its_temperature_from_the_whole_distribution(
    cold: Path, tmp_path: Path, layout: str
) -> None:
    from transformers import GenerationConfig

    write_export(cold, tmp_path / "out", layout=layout)
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    vocabulary = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    assert (theirs.do_sample, theirs.temperature, theirs.top_p, theirs.top_k) == (True, 0.5, 1.0, vocabulary)
    if layout == "blip3o":
        assert load_policy(str(tmp_path / "out"))[1]["sampling"]["guidance"] == 1.0


def test_a_model_of_its_own_temperature_is_sampled_at_it(
    cold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `eval` and `sample`; what differs from the other model of a comparison is said."""
    write_export(cold, tmp_path / "out")
    entry = {"import_path": f"{cold.parent / 'reward.py'}:low_tokens"}
    monkeypatch.setitem(SUITES, "ocr", replace(SUITES["ocr"], rewards=[entry], gold=[]))
    written, against = tmp_path / "result.json", str(cold.parent / "model")
    assert (
        call(
            "eval", "--model", str(tmp_path / "out"), "--n", "4", "--json", str(written), "--against", against
        )
        == 0
    )
    result = json.loads(written.read_text())
    assert (result["temperature"], result["guidance"], result["flow_steps"]) == (0.5, 1.0, 2)
    assert (
        "more differs than the model: temperature 0.5 and 1.0, guidance 1.0 and 2.0, flow_steps 2 and 3"
        in capsys.readouterr().out
    )


# ---- proof and refusal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor", ["model.layers.0.mlp.up_proj.weight", "model.sana_vae.decoder.conv_out.conv.weight"]
)
def test_a_tampered_export_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    save = loading.save_policy

    def tampering(policy: ImagePolicy, folder: Path, *arguments: Any) -> None:
        save(policy, folder, *arguments)
        stored = load_file(folder / "model.safetensors")
        stored[tensor].view(-1)[0] += 0.1
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(loading, "save_policy", tampering)
    with pytest.raises(
        ImageRLError, match=r"does not repeat the run's (tokens|pixels) .*nothing was written"
    ):
        write_export(place / "full", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ImageRLError, match="exists already"):
        write_export(place / "full", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_run_without_a_checkpoint(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="has no complete checkpoint"):
        write_export(place / "model", tmp_path / "out")


def test_another_model_under_the_run_is_noticed(place: Path, tmp_path: Path) -> None:
    checkpoint = Shards(place / "full" / "checkpoints" / "step_000002")
    policy, _ = load_policy(str(micro_folder(tmp_path / "wider", hidden_size=64)))
    with pytest.raises(ImageRLError, match=r"does not fit the model; was model\.path replaced since"):
        export_module.load_trained(policy.trainable, checkpoint)


def test_provenance_tells_the_truth(place: Path, exported: Path) -> None:
    provenance = json.loads((exported / PROVENANCE).read_text())
    assert provenance["step"] == 2 and provenance["base_model"] == str(place / "model")
    assert provenance["recipe"]["model"]["lora"]["r"] == 4 and provenance["recipe"]["optim"]["lr"] == 0.02
    assert provenance["versions"]["torch"] == torch.__version__
    files = {path.name for path in exported.iterdir()} - {PROVENANCE}
    assert provenance["sha256"].keys() == files
    for name, digest in provenance["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    logged = [record for record in read_metrics(place / "lora") if record["step"] == 2]
    assert provenance["metrics"] == logged[0] | logged[1]
    for name, value in proof_samples(load_policy(str(exported))[0]).items():
        assert provenance["proof"][f"{name}_sha256"] == hashlib.sha256(value.numpy().tobytes()).hexdigest()


# ---- the other commands take it ----------------------------------------------------------------------------


def test_sample_and_eval_take_an_export(
    place: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("sample", "a red word", "--model", str(exported), "--out", str(tmp_path / "pictures")) == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 5
    entry = {"import_path": f"{place / 'reward.py'}:low_tokens"}
    monkeypatch.setitem(SUITES, "ocr", replace(SUITES["ocr"], rewards=[entry]))
    written = tmp_path / "result.json"
    capsys.readouterr()
    assert call("eval", "--model", str(exported), "--n", "6", "--json", str(written)) == 0
    assert "low_tokens" in capsys.readouterr().out
    result = json.loads(written.read_text())
    assert (result["suite"], result["n"], result["model"]) == ("ocr", 6, str(exported))
    values = [row["low_tokens"] for row in result["per_prompt"]]
    assert result["metrics"]["low_tokens"]["mean"] == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    "flow", ["{name: nft, lora: {r: 2, target_modules: [to_q, to_v]}}", "{joint: true, max_logprob_diff: 1}"]
)
def test_an_export_holds_the_trained_decoder(place: Path, tmp_path: Path, flow: str) -> None:
    overrides = (f"algorithm.flow={flow}", "rollout.flow_steps=2", f"run.output_dir={tmp_path / 'run'}")
    recipe = write_recipe(place, *overrides, "run.steps=1", "optim.lr=0.02", "algorithm.kl_coef=0")
    assert call("train", str(recipe)) == 0
    write_export(tmp_path / "run", tmp_path / "out")
    exported, base = load_policy(str(tmp_path / "out"))[0], load_policy(str(place / "model"))[0]
    ours, theirs = exported.decoder.state_dict(), base.decoder.state_dict()
    assert ours.keys() == theirs.keys()
    changed = {name.split(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == ({"sana"} if "lora" in flow else {"sana", "connector"})
    joint = "joint" in flow
    tokens = zip(exported.trainable.parameters(), base.trainable.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in tokens) == joint
    if joint:
        assert main_error(tmp_path / "run", tmp_path / "adapter") == "export without --adapter"
        return
    assert call("export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter") == 0
    told = json.loads((tmp_path / "adapter" / PROVENANCE).read_text())
    assert told["what"] == "a LoRA adapter in the layout of diffusers"
    assert told["proof"].keys() == {"prompts", "tokens_sha256", "pixels_sha256"}
    pipeline = SanaPipeline(
        None, None, base.decoder.vae, base.decoder.sana, FlowMatchEulerDiscreteScheduler()
    )
    pipeline.load_lora_weights(str(tmp_path / "adapter"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = base.decoder.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


def test_an_adapter_has_its_own_layout_and_type(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="export without --dtype"):
        write_export(place / "lora", tmp_path / "out", adapter_only=True, dtype=torch.bfloat16)


def main_error(source: Path, target: Path) -> str:
    with pytest.raises(ImageRLError) as caught:
        write_export(source, target, adapter_only=True)
    return str(caught.value).rpartition("; ")[2]
