from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerl.models.blip3o_next.loading import load_state, read_weights, save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.errors import ImageRLError
from tests.micro import MODEL, micro_folder, micro_policy
from tests.models.helpers import edit_policy, load_policy
from tools.tiny.config import PretrainRecipe
from tools.tiny.pretrain import pretrain, refuse_foreign_stages, run


@pytest.mark.parametrize("kept", [["tokenizer"], ["tokenizer", "autoencoder", "generator"]])
def test_an_interrupted_pretraining_continues_with_the_stage_it_was_in(
    tmp_path: Path, kept: list[str]
) -> None:
    short = {"steps": 2, "batch_size": 2, "bf16": False}
    out = tmp_path / "out"
    recipe = PretrainRecipe(
        kind="pretrain",
        run={"output_dir": str(out)},
        text_tokenizer={"vocabulary": 300},
        model=MODEL,
        tokenizer=short,
        autoencoder=short,
        generator=short,
        decoder={**short, "batch_size": 8, "pictures": 64},
    )
    results = []
    for attempt in range(2):
        policy, config = micro_policy()
        policy.decoder.requires_grad_(True)

        def save(folder: Path, policy: ImagePolicy = policy, config: Any = config) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            save_policy(policy, folder, config)

        def load(folder: Path, policy: ImagePolicy = policy) -> None:
            load_state(policy, read_weights(folder), folder)

        pretrain(policy, recipe, save, load)
        assert policy.decoder.scaling_factor != 1.0
        results.append(read_weights(out / "model"))
        if not attempt:
            made = {"tokenizer.safetensors", "autoencoder.safetensors", "generator"}
            for name in made - {f"{name}.safetensors" for name in kept} - set(kept):
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    record = [json.loads(line) for line in (out / "pretrain.jsonl").read_text().splitlines()]
    stages = [entry["stage"] for entry in record if entry["step"] == 0]
    everything = ["tokenizer", "autoencoder", "generator", "decoder"]
    assert stages == everything + [name for name in everything if name not in kept]
    assert all(math.isfinite(entry["loss"]) and entry["images_per_s"] > 0 for entry in record)
    facts = json.loads((out / "model" / "pretraining.json").read_text())
    assert set(facts["stages"]) == set(everything) and facts["recipe"]["generator"]["steps"] == 2


SHORT = {"steps": 2, "batch_size": 8, "bf16": False}
DECODER = {**SHORT, "renew": False, "edit_share": 0.5, "pictures": 64}


def going_on(place: Path, begun: Path, **sections: Any) -> PretrainRecipe:
    """A recipe that goes on from a model folder."""
    out = {"output_dir": str(place / "out")}
    return PretrainRecipe(**{"kind": "pretrain", "run": out, "init": str(begun), **sections})


def test_a_model_that_draws_learns_to_edit_and_to_read(tmp_path: Path) -> None:
    """The whole command, from a model folder to one that does all three tasks."""
    begun = micro_folder(tmp_path / "begun")
    tasks = {**SHORT, "snapshot_every": 1}
    run(going_on(tmp_path, begun, text_tokenizer={"vocabulary": 320}, tasks=tasks, decoder=DECODER))
    old, new = read_weights(begun), read_weights(tmp_path / "out" / "model")
    kept = [name for name in old if name.startswith(("image_tokenizer.", "model.sana_vae."))]
    assert kept
    for name in kept:
        torch.testing.assert_close(new[name], old[name], rtol=1e-2, atol=1e-2)  # stored as bfloat16
    assert any(name.startswith("model.und_image_vae_connector.") for name in new)
    policy, config = load_policy(str(tmp_path / "out" / "model"))
    assert config["edit"] and (tmp_path / "out" / "snapshot_000001").is_dir()
    assert isinstance(policy.answer([Image.new("RGB", (64, 32))], ["what is written?"], 2)[0], str)
    facts = json.loads((tmp_path / "out" / "model" / "pretraining.json").read_text())
    assert set(facts["stages"]) == {"tasks", "decoder"}
    assert {"draw", "edit", "read"} <= set(facts["stages"]["tasks"])


def test_the_decoder_of_a_finished_model_goes_on_learning(tmp_path: Path) -> None:
    """Without `tasks` the language model, its text tokenizer and what it was taught stay as they are."""
    begun = tmp_path / "begun"
    policy, config = edit_policy()
    begun.mkdir()
    save_policy(policy, begun, config)
    (begun / "pretraining.json").write_text('{"stages": {"tasks": {"step": 7}}}')
    run(going_on(tmp_path, begun, decoder=DECODER))
    old, new = (read_weights(folder) for folder in (begun, tmp_path / "out" / "model"))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name].bfloat16(), new[name])}
    assert {name.split(".")[1] for name in changed} == {
        "sana",
        "diffusion_connector",
        "und_image_vae_connector",
    }
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (begun / name).read_bytes()
    facts = json.loads((tmp_path / "out" / "model" / "pretraining.json").read_text())
    assert set(facts["stages"]) == {"decoder"} and facts["init"]["stages"]["tasks"]["step"] == 7


def test_a_model_that_only_draws_is_not_given_a_decoder_for_edits(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="give a model trained to edit pictures"):
        run(going_on(tmp_path, micro_folder(tmp_path / "begun"), decoder=DECODER))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run": {"seed": 1}}, "run.seed"),
        ({"text_tokenizer": {"vocabulary": 330}}, "text_tokenizer.vocabulary"),
        ({"tokenizer": {"steps": 3}}, "tokenizer.steps"),
        ({"model": {"scheduler": {**MODEL["scheduler"], "shift": 3.0}}}, "model.scheduler.shift"),
    ],
)
def test_weights_kept_from_other_settings_are_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    """A language model under the text tokenizer of another seed would silently learn from other words."""
    recipe: dict[str, Any] = {
        "kind": "pretrain",
        "run": {"output_dir": str(tmp_path)},
        "text_tokenizer": {"vocabulary": 300},
        "model": MODEL,
        **dict.fromkeys(("tokenizer", "autoencoder", "generator"), SHORT),
    }
    (tmp_path / "recipe.yaml").write_text(PretrainRecipe(**recipe).to_yaml())
    refuse_foreign_stages(tmp_path, PretrainRecipe(**recipe | {"text_tokenizer": {"vocabulary": 310}}))
    (tmp_path / "tokenizer.safetensors").touch()
    refuse_foreign_stages(tmp_path, PretrainRecipe(**recipe))
    refuse_foreign_stages(tmp_path, PretrainRecipe(**recipe | {"generator": {**SHORT, "steps": 3}}))
    changed = {key: {**recipe[key], **value} for key, value in change.items()}
    with pytest.raises(ImageRLError, match=f"begun with another {named}; set another run.output_dir"):
        refuse_foreign_stages(tmp_path, PretrainRecipe(**recipe | changed))
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(ImageRLError, match="no recipe"):
        refuse_foreign_stages(tmp_path, PretrainRecipe(**recipe))


STAGES = dict.fromkeys(("tokenizer", "autoencoder", "generator"), SHORT)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "model, tokenizer, autoencoder, generator must be given where init is not"),
        ({"init": "tiny"}, "tasks, decoder or both must be given where init is"),
        ({"init": "tiny", "tasks": SHORT, "generator": SHORT}, "generator must be left out"),
        ({"model": MODEL, **STAGES, "tasks": SHORT}, "name it as init"),
        ({"model": MODEL, **STAGES, "decoder": {**SHORT, "edit_share": 0.5}}, "name it as init"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(sections: dict[str, Any], message: str) -> None:
    recipe = {"kind": "pretrain", "run": {"output_dir": "x"}, "text_tokenizer": {}, **sections}
    with pytest.raises(ImageRLError, match=message):
        validate_recipe(PretrainRecipe, recipe, "recipe.yaml")
