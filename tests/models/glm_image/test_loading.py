"""Folders that are no GLM-Image, or not a whole one, are refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imagerl.models import families
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt
from tests.models.glm_image.small import build_pipeline, small_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("whole") / "model")


def index(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def settings(part: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def cut(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def overflowing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["encoder.final_layer_norm.weight"][0] = torch.nan
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (index(_class_name="FluxPipeline"), "type 'FluxPipeline' that is of none of the families"),
        (index(transformer=["os", "system"]), r"transformer is \['os', 'system'\], not a GlmImageTransformer2DModel"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "has no folder scheduler; copy the model again"),
        (cut, "transformer/diffusion_pytorch_model.safetensors is damaged or cut short"),
        (pickled, "is a pickle and is not loaded; convert it to safetensors"),
        (overflowing, "numbers that are not finite"),
        (settings("transformer", prior_vq_quantizer_codebook_size=40), "does not (load as a Glm|fit its config)"),
        (settings("vae", latents_mean=None), "vae lacks latents_mean and latents_std for channels: 0, and 4"),
        (lambda folder: (folder / "sampling.json").write_text('{"height": 100}'), "height is 100"),
        (lambda folder: (folder / "sampling.json").write_text('{"steps": 3}'), '"steps"'),
    ],
)  # fmt: skip
def test_folders_that_are_not_whole_are_refused(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ImageRLError, match=message) as refusal:
        families.load_policy(str(folder))
    assert "\n" not in str(refusal.value)


def test_prompts_that_the_model_cannot_draw_are_refused_at_their_place(whole: Path) -> None:
    reader = families.load_prompts(str(whole))
    good = Prompt(0, "a cup", {"height": 96, "width": 64})
    assert reader.canvas(good).pixels == (96, 64) and reader.canvas(Prompt(0, "a cup")).pixels == (64, 32)
    for bad, message in (
        (
            Prompt(1, "a cup", {"height": 100, "width": 64}, "signs.csv", 7),
            "signs.csv, line 7: height is 100",
        ),
        (Prompt(1, "write <sop>9 9<eop>"), "prompt 2: the prompt holds <"),
        (Prompt(1, "word " * 400), "prompt 2: .* tokens long, and the model has 1024 positions"),
    ):
        with pytest.raises(ImageRLError, match=message):
            reader.require([good, bad])
    with pytest.raises(ImageRLError, match="answers no questions"):
        reader.require([good], questions=True)


def test_a_checkpoint_in_shards_loads_too(whole: Path, tmp_path: Path) -> None:
    """As the published one is stored, in either library's way."""
    folder, pipeline = Path(shutil.copytree(whole, tmp_path / "model")), build_pipeline(layers=1)
    for part in ("transformer", "vision_language_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        getattr(pipeline, part).save_pretrained(folder / part, max_shard_size="60KB")
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    policy = families.load_policy(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for part in policy.parts().values() for p in part.parameters()} == {torch.bfloat16}
