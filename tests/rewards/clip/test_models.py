"""Loading models of pictures and words, beside what their own libraries make of them, and every way it can go wrong."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imagerl.rewards.clip import packages as clip_packages
from imagerl.rewards.clip.models import load_clip
from imagerl.rl.types import ImageRLError
from tests.rewards.clip_folders import CAPTIONS, need_open_clip, open_clip_folder, transformers_folder

PICTURES = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    need_open_clip()
    return open_clip_folder(tmp_path_factory.mktemp("open_clip"))


def test_features_are_those_of_open_clip(folder: str) -> None:
    open_clip = need_open_clip()
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    with torch.no_grad():
        pictures = theirs.encode_image(torch.stack([preprocess(p) for p in PICTURES]), normalize=True)
        captions = theirs.encode_text(
            open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS), normalize=True
        )
    ours = load_clip(folder, batch_size=2)  # 3 samples: a whole batch and a rest
    torch.testing.assert_close(ours.encode_pictures(PICTURES), pictures, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_captions(CAPTIONS), captions, rtol=0, atol=1e-5)
    assert ours.width == 24
    assert ours.scale == pytest.approx(1 / 0.07, rel=0.01)  # open_clip's initial one, in bfloat16
    assert ours.bias == 0.0
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


def test_bfloat16_is_near_float32(folder: str) -> None:
    exact, rounded = load_clip(folder), load_clip(folder, dtype="bfloat16")
    a, b = exact.encode_pictures(PICTURES), rounded.encode_pictures(PICTURES)
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.02
    assert (exact.encode_captions(CAPTIONS) - rounded.encode_captions(CAPTIONS)).abs().max() < 0.02


def test_an_architecture_with_a_file_of_weights(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = need_open_clip()
    config = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = folder
    (tmp_path / "my-arch.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    open_clip.add_model_config(tmp_path / "my-arch.json")
    weights = tmp_path / "weights.pt"
    torch.save(load_file(Path(folder) / "open_clip_model.safetensors"), weights)
    model = load_clip("my-arch", pretrained=str(weights))
    torch.testing.assert_close(model.encode_captions(CAPTIONS), load_clip(folder).encode_captions(CAPTIONS))


@pytest.mark.parametrize(("kind", "width"), [("clip", 8), ("siglip", 16)])
def test_similarities_are_those_of_transformers(kind: str, width: int, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    source = transformers_folder(tmp_path, kind)
    tokens = AutoTokenizer.from_pretrained(source)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    if kind == "siglip":
        del tokens["attention_mask"]
    pixels = AutoImageProcessor.from_pretrained(source, backend="pil")(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(source).eval()(
            input_ids=tokens["input_ids"],
            attention_mask=tokens.get("attention_mask"),
            pixel_values=pixels["pixel_values"],
        )
    ours = load_clip(source, batch_size=2)
    cosines = ours.encode_captions(CAPTIONS) @ ours.encode_pictures(PICTURES).T
    torch.testing.assert_close(ours.scale * cosines + ours.bias, theirs.logits_per_text, rtol=1e-4, atol=1e-4)
    assert ours.width == width


def mistake(**settings: str) -> str:
    """What a user is told, which must be one line."""
    with pytest.raises(ImageRLError) as caught:
        load_clip(**settings)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    need_open_clip()
    assert "'tiny_clp' is no folder and no model of open_clip; did you mean tiny_clip?" in mistake(
        model="tiny_clp"
    )
    assert "For a hub name write hf-hub:owner/name" in mistake(model="models/my_clip")
    assert "there is no folder ./nothing" in mistake(model="./nothing", library="transformers")
    assert "neither open_clip_config.json nor config.json" in mistake(
        model=str(tmp_path), library="open_clip"
    )
    assert "library must be one of" in mistake(model="tiny_clip", library="jax")
    assert "dtype must be" in mistake(model="tiny_clip", dtype="int8")
    assert "there is no device 'warp'" in mistake(model="tiny_clip", device="warp")


def test_weights_that_lead_nowhere(folder: str, tmp_path: Path) -> None:
    assert "name its weights in pretrained: a file, or a tag to fetch: openai, laion400m" in mistake(
        model="ViT-B/32"
    )
    assert "ViT-B-32 has no weights 'open_ai', only: openai" in mistake(
        model="ViT-B-32", pretrained="open_ai"
    )
    assert "there is no file gone.pt" in mistake(model="ViT-B-32", pretrained="gone.pt")
    assert "has weights of its own; leave pretrained out" in mistake(model=folder, pretrained="openai")
    wrong = tmp_path / "wrong.safetensors"
    save_file({"visual.proj": torch.zeros(2, 2)}, wrong)
    assert "ViT-B-32 with" in (told := mistake(model="ViT-B-32", pretrained=str(wrong)))
    assert "cannot be loaded (RuntimeError: Error(s) in loading state_dict for CLIP: Missing key" in told


def test_a_folder_without_weights_or_with_a_pickle(folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "open_clip_model.safetensors").unlink()
    assert "Required pretrained weights" in mistake(model=str(broken))
    torch.save({"visual.proj": Path("not a tensor")}, broken / "open_clip_pytorch_model.bin")
    assert "UnpicklingError: Weights only load failed" in mistake(model=str(broken))


def test_a_folder_never_fetches_a_part(folder: str, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(folder, remote)
    config = json.loads((remote / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "owner/text"
    (remote / "open_clip_config.json").write_text(json.dumps(config))
    assert "is built from owner/text, which is on the hub" in mistake(model=str(remote))


def test_a_transformers_folder_that_lacks_tensors_or_is_something_else(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3Model

    source = Path(transformers_folder(tmp_path / "clip", "clip"))
    weights = load_file(source / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert "lack 1 tensors, such as text_projection.weight" in mistake(model=str(source))
    other = source.parent / "other"
    shutil.copytree(source, other)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    Qwen3Model(Qwen3Config(vocab_size=9, **sizes)).save_pretrained(other)
    assert "is a Qwen3Model, not a model of pictures and words" in mistake(model=str(other))


def test_open_clip_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(clip_packages, "FOLDER", "no such folder")
    assert mistake(model="ViT-B-32", pretrained="openai") == (
        "open_clip is not installed; install it with: pip install 'imagerl[clip]'"
    )


def test_the_shim_is_only_for_torchvision_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a torch that fits, nothing is declared; an error of another kind is told, not hidden."""
    need_open_clip()

    def fail(name: str) -> None:
        raise RuntimeError("another error")

    monkeypatch.setattr(clip_packages.importlib, "import_module", fail)
    with pytest.raises(ImageRLError, match=r"another error.*install torch and torchvision of one build"):
        clip_packages.import_open_clip()


def test_nobody_else_sees_the_folder_of_open_clip() -> None:
    """A child that inherits the path would have transformers find a torchvision that does not load there."""
    need_open_clip()
    assert str(Path(sys.prefix) / clip_packages.FOLDER) not in sys.path
