"""A run that began from a published-layout folder, and every layout that it can leave in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.api.exporting import PROVENANCE, proof_samples, recipe_of, trained_policy, write_export
from imagerl.models.blip3o_next import exporting as export_module
from imagerl.models.blip3o_next.exporting import save_published
from imagerl.models.blip3o_next.family import Blip3oNext
from imagerl.models.common.shards import Shards
from imagerl.rl.errors import ImageRLError
from tests.command import call
from tests.micro import micro_folder, micro_policy
from tests.models.helpers import load_policy
from tests.small_run import write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published-layout model, and a run of one step from it."""
    folder = tmp_path_factory.mktemp("layouts")
    base = micro_folder(folder / "ours")
    policy, config = micro_policy()
    (folder / "model").mkdir()
    save_published(policy, folder / "model", config, base)
    overrides = (f"run.output_dir={folder / 'run'}", "run.steps=1", "optim.lr=0.02")
    assert call("train", str(write_recipe(folder, *overrides))) == 0
    return folder


def test_load_train_export_load_gives_equal_tokens_and_pixels(place: Path, tmp_path: Path) -> None:
    assert call("export", str(place / "run"), str(tmp_path / "out"), "--layout", "blip3o") == 0
    before, after = Shards(place / "model"), Shards(tmp_path / "out")
    assert after.shapes == before.shapes
    flat = [
        json.loads((folder / "config.json").read_text()) for folder in (place / "model", tmp_path / "out")
    ]
    sampling = [config["imagerl"].pop("sampling") for config in flat]
    assert flat[0] == flat[1]
    assert (
        sampling[1] == {"temperature": 1.0, "guidance": 2.0, "flow_steps": 1} != sampling[0]
    )  # the run's own
    again = proof_samples(load_policy(str(tmp_path / "out"))[0])
    trained = proof_samples(trained_policy(*recipe_of(place / "run")))
    assert all(torch.equal(value, trained[name]) for name, value in again.items())
    untrained = proof_samples(load_policy(str(place / "model"))[0])
    assert not torch.equal(untrained["tokens"], again["tokens"])


@pytest.mark.parametrize(("layout", "proved"), [("qwen3", "logits"), ("diffusers", "pixels")])
def test_the_halves_are_proved_too(place: Path, tmp_path: Path, layout: str, proved: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert call("export", str(place / "run"), str(out), "--layout", layout, "--dtype", "bf16") == 0
    assert f"proved equal in {proved}\n" in capsys.readouterr().out
    provenance = json.loads((out / PROVENANCE).read_text())
    assert provenance["layout"] == layout and f"{proved}_sha256" in provenance["proof"]
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert provenance["sha256"].keys() == files - {PROVENANCE}


@pytest.mark.parametrize("layout", ["qwen3", "diffusers"])
def test_a_tampered_half_is_refused(
    place: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"qwen3": "save_language_model", "diffusers": "save_diffusers"}[layout]
    save = getattr(export_module, name)

    def tampering(policy: Any, *arguments: Any) -> None:
        part = policy.trainable.lm.model.norm if layout == "qwen3" else policy.decoder.connector[3]
        part.weight.data *= 2
        save(policy, *arguments)
        part.weight.data /= 2

    monkeypatch.setattr(export_module, name, tampering)
    with pytest.raises(ImageRLError, match=r"does not repeat the run's (logits|pixels)"):
        write_export(place / "run", tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_layout_and_an_adapter_in_another(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ImageRLError, match=f"no layout 'blip3'; choose one of {', '.join(Blip3oNext.layouts)}"
    ):
        write_export(place / "run", tmp_path / "out", layout="blip3")
    with pytest.raises(ImageRLError, match="an adapter has a layout of its own"):
        write_export(place / "run", tmp_path / "out", adapter_only=True, layout="blip3o")


@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_a_run_with_frozen_parts_in_bfloat16(place: Path, tmp_path: Path, lora: str) -> None:
    overrides = (
        f"model.lora={lora}",
        "model.dtype=bf16",
        "engine.precision=bf16",
        f"run.output_dir={tmp_path / 'run'}",
    )
    recipe = write_recipe(place, *overrides, "run.steps=1", name="bf16.yaml")
    assert call("train", str(recipe)) == 0
    write_export(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16, layout="blip3o")
    assert {entry.dtype for entry in Shards(tmp_path / "out").entries.values()} == {torch.bfloat16}
