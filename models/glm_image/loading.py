"""Read and write GLM-Image folders, in the layout of the hub: a part a folder, each of a class of the libraries.

Weights are safetensors only. Nothing is unpickled, no code from a folder is run, and no other model is fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from imagerl.models.common.settings import SamplingSettings, stored_sampling
from imagerl.models.common.shards import WEIGHTS, Shards, own_memory, require_finite
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.models.glm_image.prompts import PromptEncoder
from imagerl.models.glm_image.sizes import TOKEN_PIXELS, Size, require_size
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import read_json
from imagerl.rl.types import SamplingParams

INDEX, SAMPLING = "model_index.json", "sampling.json"
PIPELINE = "GlmImagePipeline"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# part -> class, library, weights
MODELS = {
    "vision_language_encoder": ("GlmImageForConditionalGeneration", "transformers", WEIGHTS),
    "text_encoder": ("T5EncoderModel", "transformers", WEIGHTS),
    "transformer": ("GlmImageTransformer2DModel", "diffusers", DIFFUSERS_WEIGHTS),
    "vae": ("AutoencoderKL", "diffusers", DIFFUSERS_WEIGHTS),
}
OTHERS = {
    "processor": ("GlmImageProcessor", "transformers"),
    "tokenizer": ("ByT5Tokenizer", "transformers"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", "diffusers"),
}


class DrawingSettings(SamplingSettings):
    """How a model draws where a user says nothing else, in sampling.json beside its parts: the pipeline's own defaults,
    and the whole distribution of the tokens."""

    guidance: float = Field(1.5, ge=0, le=1000)
    flow_steps: int = Field(50, ge=1, le=1000)
    height: int = Field(1024, ge=1)
    width: int = Field(1024, ge=1)


def load_policy(folder: Path, device: torch.device | str, dtype: torch.dtype) -> GlmImagePolicy:
    """Load a policy with all its parts in `dtype`, in evaluation mode, nothing but `trainable` with gradients."""
    from diffusers import GlmImagePipeline

    check_index(folder)
    with quiet():
        parts = {name: load_model(folder, name, dtype) for name in MODELS}
        parts |= {name: load_other(folder, name) for name in OTHERS}
    _require_fit(folder, **parts)
    for name in MODELS:
        parts[name].requires_grad_(False).eval().to(device)
    sampling, size = read_sampling(folder)
    policy = GlmImagePolicy(GlmImagePipeline(**parts), sampling, size)
    policy.trainable.requires_grad_(True).eval()
    policy.decoder.eval()
    return policy


def load_prompts(folder: Path) -> PromptEncoder:
    """Return what the model in a folder can be asked; no weights are read."""
    from diffusers import AutoencoderKL, GlmImageTransformer2DModel
    from transformers import GlmImageConfig

    check_index(folder)
    ar = GlmImageConfig.from_pretrained(folder / "vision_language_encoder", local_files_only=True)
    transformer = GlmImageTransformer2DModel.load_config(folder / "transformer", local_files_only=True)
    vae = AutoencoderKL.load_config(folder / "vae", local_files_only=True)
    return PromptEncoder(
        load_other(folder, "processor"),
        ar.text_config.max_position_embeddings,
        read_sampling(folder)[1],
        transformer["in_channels"],
        2 ** (len(vae["block_out_channels"]) - 1),
    )


def save_policy(policy: GlmImagePolicy, folder: Path, base: Path, dtype: torch.dtype | None) -> None:
    """Write a policy without adapters. What has no weights is copied from `base`, file by file."""
    shutil.copy(base / INDEX, folder / INDEX)
    for name in OTHERS:
        shutil.copytree(base / name, folder / name)
    with quiet():
        for name in MODELS:
            part = getattr(policy.pipeline, name)
            own, stored = part.dtype, dtype or part.dtype
            if stored != own:
                part.to(stored)
            part.save_pretrained(folder / name)
            if stored != own:
                part.to(own)
            if MODELS[name][1] == "diffusers":  # which notes down where the weights came from
                shutil.copy(base / name / "config.json", folder / name / "config.json")
    settings = stored_sampling(policy.sampling) | policy.default_size._asdict()
    (folder / SAMPLING).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def weights_again(policy: GlmImagePolicy, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Digest the weights of a policy's parts, and the same as the library's pipeline loads them from a folder."""
    from diffusers import GlmImagePipeline

    with quiet():
        again = GlmImagePipeline.from_pretrained(
            folder, torch_dtype=policy.model.dtype, local_files_only=True, use_safetensors=True
        )
    return {
        f"{name} weights": (_digest(getattr(policy.pipeline, name)), _digest(getattr(again, name)))
        for name in MODELS
    }


def _digest(part: Any) -> Tensor:
    """Return SHA-256 over the names and numbers of a module's weights, [32] bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def check_index(folder: Path) -> None:
    """Raise ImageRLError unless the folder is a whole GLM-Image pipeline of the libraries' own classes."""
    file = folder / INDEX
    if not file.is_file():
        raise ImageRLError(f"{folder} has no {INDEX}; give the folder of a GLM-Image pipeline")
    index = read_json(file)
    found = index.get("_class_name") if isinstance(index, dict) else None
    if found != PIPELINE:
        raise ImageRLError(f"{file} describes a {found}, not a {PIPELINE}; give a GLM-Image model")
    for name, (wanted, *_) in (MODELS | OTHERS).items():
        # diffusers would import whatever module and class stand here
        if index.get(name, [None, None])[1:] != [wanted]:
            raise ImageRLError(f"{file}: {name} is {index.get(name)}, not a {wanted}; give a GLM-Image model")
        if not (folder / name).is_dir():
            raise ImageRLError(f"{folder} has no folder {name}; copy the model again")


def load_model(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Load a part with weights by its library, each tensor once. Raises ImageRLError when files are damaged or do not
    fit its settings."""
    kind, library, weights = MODELS[name]
    where = folder / name
    Shards(where, weights)  # raises for missing, damaged and pickled files
    settings: dict[str, Any] = {"attn_implementation": "sdpa"} if library == "transformers" else {}
    try:
        part, report = getattr(import_module(library), kind).from_pretrained(
            where,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # what the libraries raise of settings and weights that do not fit
        raise ImageRLError(f"{where} does not load as a {kind}: {one_line(error, 200)}") from error
    wrong = [f"no {key}" for key in report["missing_keys"]] + [
        f"{key} too" for key in report["unexpected_keys"]
    ]
    if wrong or report["mismatched_keys"]:
        what = wrong[0] if wrong else f"{next(iter(report['mismatched_keys']))} of another shape"
        raise ImageRLError(f"{where} does not fit its config.json: it has {what}; copy the model again")
    own_memory(part)
    for key, tensor in (*part.named_parameters(), *part.named_buffers()):
        require_finite(tensor.data, f"{where}: {key}")
    return part


def load_other(folder: Path, name: str) -> Any:
    """Load a part that has settings and vocabularies only."""
    kind, library = OTHERS[name]
    settings = {"trust_remote_code": False} if library == "transformers" else {}
    try:
        loaded = getattr(import_module(library), kind)
        return loaded.from_pretrained(folder / name, local_files_only=True, **settings)
    except Exception as error:  # the libraries raise anything on files that are not theirs
        raise ImageRLError(f"{folder / name} does not load as a {kind}: {one_line(error, 200)}") from error


def read_sampling(folder: Path) -> tuple[SamplingParams, Size]:
    """Return how the model in a folder draws, and what size."""
    file = folder / SAMPLING
    given = validated(DrawingSettings, read_json(file), str(file)) if file.is_file() else DrawingSettings()
    values = given.model_dump()
    size = Size(values.pop("height"), values.pop("width"))
    return SamplingParams(**values), require_size(size)


def _require_fit(folder: Path, **parts: Any) -> None:
    """Raise ImageRLError when two parts are not of the same model."""
    ar, transformer, vae = (parts[name].config for name in ("vision_language_encoder", "transformer", "vae"))
    codes = ar.vq_config.num_embeddings
    patch = transformer.patch_size * 2 ** (len(vae.block_out_channels) - 1)
    for what, found, wanted in (
        ("transformer knows image tokens", transformer.prior_vq_quantizer_codebook_size, codes),
        (
            "transformer reads glyphs of width",
            transformer.text_embed_dim,
            parts["text_encoder"].config.d_model,
        ),
        ("transformer draws latents of channels", transformer.in_channels, vae.latent_channels),
        ("transformer and vae have a patch of pixels", patch, TOKEN_PIXELS // 2),
        (
            "vae lacks latents_mean and latents_std for channels",
            len(vae.latents_mean or ()),
            vae.latent_channels,
        ),
        ("scheduler keeps its terminal level", parts["scheduler"].config.get("shift_terminal"), None),
    ):
        if found != wanted:
            raise ImageRLError(
                f"{folder}: {what}: {found}, and {wanted} is needed; its parts are of different models"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from drawing progress bars, in a context."""
    import diffusers
    import transformers

    logs = [library.utils.logging for library in (transformers, diffusers)]
    shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was in zip(logs, shown, strict=True):
            if was:
                log.enable_progress_bar()
