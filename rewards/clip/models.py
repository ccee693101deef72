"""Load contrastive models of pictures and words: any of open_clip's, and transformers' CLIP and SigLIP.

Nothing is fetched unless the name of a model says so: a folder is only read, weights are safetensors or tensors alone
(`weights_only=True`), and no code of a model folder runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagerl.rewards.clip.packages import import_open_clip
from imagerl.rewards.hub import device_of, model_source, weights_file
from imagerl.rl.errors import nearest, why
from imagerl.rl.types import ImageRLError

SHIPPED = ("tiny_clip",)  # folders beside this file
HUB = "hf-hub:"  # open_clip's own prefix
LIBRARIES = ("auto", "open_clip", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ClipModel:
    """Both halves of a model. Features are [B, width] float32 on the CPU, of length 1."""

    width: int
    scale: float  # what the model multiplies similarities by
    bias: float
    encode_pictures: Callable[[Sequence[Image.Image]], Tensor]  # RGB
    encode_captions: Callable[[Sequence[str]], Tensor]


def load_clip(
    model: str,
    pretrained: str | None = None,
    library: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 64,
) -> ClipModel:
    """Load a model by the name that a recipe gives it:

    - `tiny_clip`, which ships; a folder in open_clip's format (`open_clip_config.json`) or transformers';
    - an open_clip architecture such as ViT-B-32, with a tag or a file of weights in `pretrained`;
    - `hf-hub:owner/name`, a repository in open_clip's format; `owner/name` with `library="transformers"`.

    `dtype` is bfloat16 on a GPU and float32 elsewhere, unless given. Raises ImageRLError in one line: no such model,
    tag or file, weights that do not fit, open_clip missing."""
    if library not in LIBRARIES:
        raise ImageRLError(f"reward 'clip': library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    if dtype not in ("auto", *DTYPES):
        raise ImageRLError(f"reward 'clip': dtype must be auto, float32 or bfloat16, not {dtype!r}")
    place = device_of(device, "clip")
    kind = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if place.type == "cuda" else torch.float32
    if model in SHIPPED:
        folder: Path | None = Path(str(files("rewards") / model))
    else:
        folder = Path(model).expanduser() if Path(model).expanduser().is_dir() else None
    if library == "auto":
        library = (
            "transformers" if folder and not (folder / "open_clip_config.json").is_file() else "open_clip"
        )
    if library == "transformers":
        return _load_transformers(model, folder, place, kind, batch_size)
    return _load_open_clip(_open_clip_name(model, folder), model, folder, pretrained, place, kind, batch_size)


def _open_clip_name(model: str, folder: Path | None) -> str:
    """Return open_clip's name for a model. Raises ImageRLError for one that is neither a folder nor known to it."""
    if folder is not None:
        if not (folder / "open_clip_config.json").is_file():
            raise ImageRLError(
                f"reward 'clip': folder {model} holds neither open_clip_config.json nor config.json"
            )
        return f"local-dir:{folder}"
    if model.startswith(HUB):
        return model
    known = import_open_clip().list_models()
    name = model.replace("/", "-")
    if name in known:
        return name
    close = nearest(name, [*known, *SHIPPED])
    meant = f"did you mean {close}? " if close else ""
    raise ImageRLError(
        f"reward 'clip': {model!r} is no folder and no model of open_clip; {meant}For a hub name write "
        f"{HUB}owner/name, or owner/name with library: transformers"
    )


def _load_open_clip(
    name: str,
    shown: str,
    folder: Path | None,
    pretrained: str | None,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> ClipModel:
    open_clip = import_open_clip()
    if (
        pretrained is not None and pretrained.count("/") == 2
    ):  # as none of its tags; perhaps a file on the hub
        pretrained = weights_file(pretrained, "clip")
    if folder is None and not name.startswith(HUB):
        _check_pretrained(open_clip, name, pretrained)
    elif pretrained is not None:
        raise ImageRLError(f"reward 'clip': {shown} has weights of its own; leave pretrained out")
    if folder is not None:
        _refuse_remote_parts(open_clip.get_model_config(name), shown)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            pretrained=pretrained,
            precision="bf16" if dtype == torch.bfloat16 else "fp32",
            device=device,
            require_pretrained=True,
            weights_only=True,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, safetensors, torch and the hub's client have many
        raise _unloadable(shown, pretrained, error) from error
    model.eval().requires_grad_(False)
    bias = getattr(model, "logit_bias", None)

    def pictures(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images])
        return model.encode_image(pixels.to(device, dtype))

    def captions(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(texts)).to(device))

    return _in_batches(pictures, captions, batch_size, model.logit_scale.exp().item(), bias)


def _check_pretrained(open_clip: ModuleType, name: str, pretrained: str | None) -> None:
    """Raise ImageRLError unless `pretrained` is a file or a tag of this architecture."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ImageRLError(
            f"reward 'clip': {name} is an architecture; name its weights in pretrained: a file, or a tag to fetch: "
            f"{', '.join(tags) or 'it has none'}"
        )
    if Path(pretrained).is_file() or open_clip.get_pretrained_cfg(name, pretrained):
        return
    if "/" in pretrained or Path(pretrained).suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise ImageRLError(f"reward 'clip': there is no file {pretrained}; correct pretrained")
    raise ImageRLError(
        f"reward 'clip': {name} has no weights {pretrained!r}, only: {', '.join(tags) or 'none; name a file'}"
    )


def _refuse_remote_parts(config: Any, shown: str) -> None:
    """Refuse a folder whose configuration names halves on the hub, which building it would fetch."""
    text = (config.get("text_cfg") or {}).get("hf_model_name")
    picture = (config.get("vision_cfg") or {}).get("timm_model_name") or ""
    for part in (text, picture if picture.startswith(("hf-hub:", "hf_hub:")) else None):
        if part and not Path(part).is_dir():
            raise ImageRLError(
                f"reward 'clip': folder {shown} is built from {part}, which is on the hub; name it {HUB}owner/name, "
                "or copy that part and give its path in the configuration"
            )


def _unloadable(shown: str, pretrained: str | None, error: Exception) -> ImageRLError:
    what = f"{shown} with {pretrained}" if pretrained else shown
    return ImageRLError(f"reward 'clip': {what} cannot be loaded ({why(error)})")


def _load_transformers(
    name: str, folder: Path | None, device: torch.device, dtype: torch.dtype, batch_size: int
) -> ClipModel:
    """Load a dual encoder with `get_image_features` and `get_text_features`: CLIP, SigLIP, SigLIP 2 and their kin."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    source, local = model_source(str(folder or name), "clip", "model")
    try:
        model, loading = AutoModel.from_pretrained(source, dtype=dtype, output_loading_info=True, **local)
        # Pillow's arithmetic, whether torchvision is there or not.
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **local)
        tokenizer = AutoTokenizer.from_pretrained(source, **local)
    except Exception as error:  # as above
        raise _unloadable(name, None, error) from error
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise ImageRLError(
            f"reward 'clip': {name} is a {type(model).__name__}, not a model of pictures and words"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ImageRLError(
            f"reward 'clip': the weights of {name} lack {len(missing)} tensors, such as {missing[0]}"
        )
    model.to(device).eval().requires_grad_(False)
    length = model.config.text_config.max_position_embeddings
    # SigLIP was trained with padded texts and no mask.
    unmasked = model.config.model_type.startswith("siglip")

    def pictures(images: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=list(images), return_tensors="pt")
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        return _pooled(model.get_image_features(**moved))

    def captions(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        wanted = ("input_ids",) if unmasked else ("input_ids", "attention_mask")
        return _pooled(model.get_text_features(**{k: inputs[k].to(device) for k in wanted}))

    return _in_batches(
        pictures, captions, batch_size, model.logit_scale.exp().item(), getattr(model, "logit_bias", None)
    )


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _in_batches(
    pictures: Callable[[Sequence[Image.Image]], Tensor],
    captions: Callable[[Sequence[str]], Tensor],
    batch_size: int,
    scale: float,
    bias: Tensor | None,
) -> ClipModel:
    """Return both halves as functions of any number of samples; one picture tells the width."""

    def batched(encode: Callable[[Any], Tensor], samples: Sequence[Any]) -> Tensor:
        with torch.inference_mode():
            parts = [
                encode(samples[start : start + batch_size]).float().cpu()
                for start in range(0, len(samples), batch_size)
            ]
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def encode_pictures(images: Sequence[Image.Image]) -> Tensor:
        return batched(pictures, images)

    width = encode_pictures([Image.new("RGB", (64, 64))]).shape[-1]
    return ClipModel(
        width,
        scale,
        0.0 if bias is None else float(bias),
        encode_pictures,
        lambda texts: batched(captions, texts),
    )
