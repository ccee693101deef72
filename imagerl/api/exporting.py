"""From a run to a model folder that others can load, proved equal before it is called done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imagerl.models.blip3o_next.adapters import adapter_base, save_adapter
from imagerl.models.blip3o_next.exporting import (
    load_diffusers,
    load_language_model,
    save_diffusers,
    save_language_model,
    save_published,
)
from imagerl.models.blip3o_next.loading import base_folder, load_policy, model_folder, save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.sft import AnyRecipe, SFTRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.seeding import generator
from imagerl.rl.engine.checkpoint import (
    CHECKPOINTS,
    latest_checkpoint,
    load_checkpoint,
    package_versions,
    step_of,
)
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics, to_json
from imagerl.rl.files.writing import atomic_folder
from imagerl.rl.rollout.engine import evaluation_sampling
from imagerl.rl.sft.objective import sft_module
from imagerl.rl.training.halves import trained_module
from imagerl.rl.types import SamplingParams

PROOF_PROMPTS = (
    'a sign that says "RIVER" in red on a white background',
    'a sign that says "472" in blue on a yellow background',
)
PROOF_SEED = 20_240_203
Proof = dict[str, np.ndarray]
PROVENANCE = "provenance.json"
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
LAYOUTS = {
    "imagerl": "a model folder for imagerl",
    "blip3o": "the layout of the published BLIP3o-NEXT checkpoints, for its own code and for imagerl",
    "qwen3": "the language model alone, for transformers, vLLM and SGLang",
    "diffusers": "the decoder alone, as a diffusers pipeline",
}


def checkpoint_of(source: Path) -> Path:
    """Return the checkpoint that a run folder or a checkpoint folder means.

    Raises ImageRLError when `source` is neither, or the run has no checkpoint yet."""
    source = source.resolve()  # the run is found above its checkpoint, wherever we are
    if source.name.startswith("step_"):
        return source
    if source.name == CHECKPOINTS:
        source = source.parent
    if not source.is_dir():
        raise ImageRLError(f"there is no folder {source}; give a run folder or one of its checkpoints/step_*")
    newest = latest_checkpoint(source / CHECKPOINTS)
    if newest is None:
        raise ImageRLError(
            f"{source} has no complete checkpoint; give a run folder or one of its checkpoints/step_*"
        )
    return newest


def trained_policy(source: Path) -> tuple[ImagePolicy, dict[str, Any], AnyRecipe, Path]:
    """Load the policy as it was at a checkpoint, its model config, the run's recipe and the checkpoint's folder. The
    config says to draw as the run drew what it was judged by; supervised training leaves that as the model had it."""
    folder = checkpoint_of(source)
    checkpoint = load_checkpoint(folder)
    stored = dict(checkpoint.state["recipe"])
    schema = SFTRecipe if stored.get("kind") == "sft" else Recipe
    recipe = validate_recipe(schema, stored, f"{folder}/state.json")
    assert isinstance(recipe, AnyRecipe)
    policy, config = load_policy(recipe.model.path)
    module = sft_module(policy, recipe) if isinstance(recipe, SFTRecipe) else trained_module(policy, recipe)
    load_trained(module, checkpoint.tensors["model"])
    if policy.flow is not None:
        policy.flow.merge_lora()
    if isinstance(recipe, Recipe):
        drawn = asdict(evaluation_sampling(recipe))
        config = {
            **config,
            "sampling": {name: drawn[name] for name in ("guidance", "flow_steps", "temperature")},
        }
    return policy, config, recipe, folder


def load_trained(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights, named as the trained module names its parameters, into that module.

    Raises ImageRLError when they belong to another model."""
    parameters = dict(module.named_parameters())
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ImageRLError(
                f"the checkpoint's {name} does not fit the model; was model.path replaced since?"
            )
        parameters[name].data.copy_(tensor)


def _proof_noise(policy: ImagePolicy) -> tuple[Tensor, Tensor]:
    """Return the uniforms [P, T] and the decoder noise [P, C, h, w] of the proof."""
    draws = generator(PROOF_SEED, "proof")
    count = len(PROOF_PROMPTS)
    uniforms = torch.rand(count, policy.num_actions, generator=draws, dtype=torch.float64)
    return uniforms, torch.randn(count, *policy.latent_shape, generator=draws)


@torch.no_grad()
def proof_samples(policy: ImagePolicy, config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [P, T] and pixels [P, 3, H, W] of fixed prompts and random numbers: what an export must repeat."""
    sampling = SamplingParams(**config["sampling"])
    ids, mask = policy.encode_prompts(PROOF_PROMPTS)
    uniforms, noise = _proof_noise(policy)
    policy.refresh_sampler()
    trajectory = policy.sample_tokens(ids, mask, uniforms, sampling.temperature)
    pixels = policy.decode(trajectory.hidden, noise, sampling.guidance, sampling.flow_steps)
    return trajectory.tokens.cpu().numpy(), pixels.cpu().numpy()


@torch.no_grad()
def repeated(
    policy: ImagePolicy, config: Mapping[str, Any], folder: Path, layout: str
) -> tuple[Proof, Proof]:
    """Return the same quantities from a policy and from its written form, loaded as its users will load it."""
    if layout == "qwen3":
        ids, mask = policy.encode_prompts(PROOF_PROMPTS)
        ours = policy.trainable.lm(input_ids=ids, attention_mask=mask).logits
        theirs = load_language_model(folder)(ids, mask)
        return {"logits": ours.numpy()}, {"logits": theirs.numpy()}
    if layout == "diffusers":
        width, sampling = policy.trainable.lm.config.hidden_size, SamplingParams(**config["sampling"])
        decoder = load_diffusers(folder, width, policy.latent_shape[1:])
        noise = _proof_noise(policy)[1]
        draws = generator(PROOF_SEED, "hidden")
        hidden = torch.randn(len(noise), policy.num_actions + 1, width, generator=draws)
        pictures = [
            each.draw(each.latents(hidden, noise, sampling.guidance, sampling.flow_steps)).numpy()
            for each in (policy.decoder, decoder)
        ]
        return {"pixels": pictures[0]}, {"pixels": pictures[1]}
    (tokens, pixels), again = proof_samples(policy, config), proof_samples(*load_policy(str(folder)))
    return {"tokens": tokens, "pixels": pixels}, {"tokens": again[0], "pixels": again[1]}


def round_weights(policy: ImagePolicy, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can store, so that the export is compared with what it will hold."""
    for module in (policy.trainable, policy.decoder, policy.image_tokenizer):
        for parameter in module.parameters() if module is not None else ():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


class ExportResult:
    """A model folder that has been written and proved, with its provenance."""

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.provenance = provenance

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        proof, step = self.provenance["proof"], self.provenance["step"]
        proved = " and ".join(key.removesuffix("_sha256") for key in proof if key != "prompts")
        layout = LAYOUTS[self.provenance["layout"]]
        return f"{self.folder}: step {step}, {layout}; reloaded and proved equal in {proved}"


def export(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    adapter: bool = False,
    dtype: str = "fp32",
    layout: str = "imagerl",
) -> ExportResult:
    """Write the policy of a run or checkpoint as a model folder, weights stored as fp32 or bf16; see `write_export`.

    Raises ImageRLError like that."""
    if dtype not in DTYPES:
        raise ImageRLError(f"dtype must be fp32 or bf16, not {dtype!r}")
    folder = Path(target)
    return ExportResult(folder, write_export(Path(source), folder, adapter, DTYPES[dtype], layout))


def write_export(
    source: Path,
    target: Path,
    adapter_only: bool = False,
    dtype: torch.dtype | None = None,
    layout: str = "imagerl",
) -> dict[str, Any]:
    """Write the policy of a run or checkpoint in one of LAYOUTS and return its provenance.

    The folder appears only once it has been loaded back and has repeated exactly what the policy does: tokens and
    pixels, or the logits or pixels of the half that was written. With LoRA the adapters are merged, or with
    `adapter_only` kept as a PEFT adapter beside the path of what it stands on: what the run began from, or the base of
    that where the run went on training its adapter. Those of a trained decoder are always merged.

    Raises ImageRLError when `target` exists, the source has no checkpoint, or the proof fails."""
    if target.exists():
        raise ImageRLError(f"{target} exists already; give another folder, or remove it first")
    if layout not in LAYOUTS:
        raise ImageRLError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if adapter_only and layout != "imagerl":
        raise ImageRLError(f"an adapter has a layout of its own; export without --layout {layout}")
    policy, config, recipe, folder = trained_policy(source)
    if adapter_only and policy.flow is not None:
        raise ImageRLError(
            "the run trained the decoder, which no adapter file holds; export without --adapter"
        )
    if adapter_only and policy.trainable.adapter is None:
        raise ImageRLError("the run trained no LoRA adapter; export without --adapter")
    if not adapter_only:
        policy.trainable.merge_adapter()
    if dtype is not None and not adapter_only:
        round_weights(policy, dtype)
    with atomic_folder(target) as temporary:
        if adapter_only:
            start = recipe.model.path
            continued = isinstance(recipe, Recipe) and recipe.model.lora is None
            base = adapter_base(model_folder(start)) if continued else start
            save_adapter(policy, temporary, base, config["sampling"])
        elif layout == "blip3o":
            save_published(policy, temporary, config, base_folder(recipe.model.path), dtype)
        elif layout == "qwen3":
            save_language_model(policy, temporary, config, dtype)
        elif layout == "diffusers":
            save_diffusers(policy, temporary, dtype)
        else:
            save_policy(policy, temporary, config, dtype)
        wanted, found = repeated(policy, config, temporary, layout)
        for what, values in wanted.items():
            if not np.array_equal(values, found[what]):
                share = float((values != found[what]).mean())
                raise ImageRLError(
                    f"the export does not repeat the run's {what} ({share:.1%} differ); nothing was written"
                )
        provenance = describe(recipe, folder, temporary, layout, wanted) | {"sampling": config["sampling"]}
        (temporary / PROVENANCE).write_text(to_json(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def describe(recipe: AnyRecipe, checkpoint: Path, folder: Path, layout: str, proof: Proof) -> dict[str, Any]:
    """Tell where a model came from: recipe, step, last metrics, versions, hashes of every file."""
    step = step_of(checkpoint)
    metrics: dict[str, Any] = {}
    for record in read_metrics(checkpoint.parent.parent):
        if record["step"] <= step:
            metrics |= record
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    return {
        "step": step,
        "layout": layout,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
        "metrics": metrics,
        "versions": package_versions(),
        "sha256": hashes,
        "proof": {
            "prompts": list(PROOF_PROMPTS),
            **{f"{name}_sha256": hashlib.sha256(v.tobytes()).hexdigest() for name, v in proof.items()},
        },
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
