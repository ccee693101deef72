"""From a run to a model folder that others can load, proved equal before it is called done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.image_policy import ImagePolicy
from models.loading import load_policy, save_adapter, save_policy
from rl.checkpoint import CHECKPOINTS, latest_checkpoint, load_checkpoint, package_versions, step_of
from rl.config import Recipe
from rl.errors import ImageRLError
from rl.files import atomic_folder
from rl.halves import trained_module
from rl.metrics import read_metrics, to_json
from rl.recipe import validate_recipe
from rl.seeding import generator

PROOF_PROMPTS = (
    'a sign that says "RIVER" in red on a white background',
    'a sign that says "472" in blue on a yellow background',
)
PROOF_SEED = 20_240_203
PROVENANCE = "provenance.json"


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder means.

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


def trained_policy(source: Path) -> tuple[ImagePolicy, dict[str, Any], Recipe, Path]:
    """The policy as it was at a checkpoint, its model config, the run's recipe and the checkpoint's folder."""
    folder = checkpoint_of(source)
    checkpoint = load_checkpoint(folder)
    recipe = validate_recipe(Recipe, dict(checkpoint.state["recipe"]), f"{folder}/state.json")
    policy, config = load_policy(recipe.model.path)
    load_trained(trained_module(policy, recipe), checkpoint.tensors["model"])
    if policy.flow is not None:
        policy.flow.merge_lora()
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


@torch.no_grad()
def proof_samples(policy: ImagePolicy, config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [P, T] and pixels [P, 3, H, W] of fixed prompts and random numbers: what an export must repeat."""
    sampling = config["sampling"]
    ids, mask = policy.encode_prompts(PROOF_PROMPTS)
    count = len(PROOF_PROMPTS)
    draws = generator(PROOF_SEED, "proof")
    uniforms = torch.rand(count, policy.num_actions, generator=draws, dtype=torch.float64)
    noise = torch.randn(count, *policy.latent_shape, generator=draws)
    policy.refresh_sampler()
    trajectory = policy.sample_tokens(ids, mask, uniforms, 1.0)
    pixels = policy.decode(trajectory.hidden, noise, sampling["guidance"], sampling["flow_steps"])
    return trajectory.tokens.cpu().numpy(), pixels.cpu().numpy()


def round_weights(policy: ImagePolicy, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can store, so that the export is compared with what it will hold."""
    for module in (policy.trainable, policy.decoder, policy.image_tokenizer):
        for parameter in module.parameters() if module is not None else ():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def export(
    source: Path, target: Path, adapter_only: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write the policy of a run or checkpoint as a model folder and return its provenance.

    The folder appears only once it has been loaded back and has repeated the same tokens and pixels exactly.
    With LoRA the adapters are merged, or with `adapter_only` kept as a PEFT adapter beside the base's path. Those of
    a trained decoder are always merged.

    Raises ImageRLError when `target` exists, the source has no checkpoint, or the proof fails."""
    if target.exists():
        raise ImageRLError(f"{target} exists already; give another folder, or remove it first")
    policy, config, recipe, folder = trained_policy(source)
    if adapter_only and policy.flow is not None:
        raise ImageRLError(
            "the run trained the decoder, which no adapter file holds; export without --adapter"
        )
    if adapter_only and policy.trainable.adapter is None:
        raise ImageRLError("the run has no LoRA adapter (model.lora is null); export without --adapter")
    if dtype is not None and not adapter_only:
        merge_adapters(policy)
        round_weights(policy, dtype)
    with atomic_folder(target) as temporary:
        if adapter_only:
            save_adapter(policy, temporary, recipe.model.path)
        else:
            save_policy(policy, temporary, config, dtype)
        wanted = proof_samples(policy, config)
        again, stored_config = load_policy(str(temporary))
        found = proof_samples(again, stored_config)
        for what, one, other in zip(("tokens", "pixels"), wanted, found, strict=True):
            if not np.array_equal(one, other):
                share = float((one != other).mean())
                raise ImageRLError(
                    f"the export does not repeat the run's {what} ({share:.1%} differ); nothing was written"
                )
        provenance = describe(recipe, folder, temporary, wanted)
        (temporary / PROVENANCE).write_text(to_json(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def merge_adapters(policy: ImagePolicy) -> None:
    """Fold LoRA into the weights for good. Nothing to do without."""
    if policy.trainable.adapter is not None:
        policy.trainable.adapter.merge_adapter()


def describe(
    recipe: Recipe, checkpoint: Path, folder: Path, proof: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Where a model came from: recipe, step, last metrics, versions, hashes of every file."""
    step = step_of(checkpoint)
    metrics: dict[str, Any] = {}
    for record in read_metrics(checkpoint.parent.parent):
        if record["step"] <= step:
            metrics |= record
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    return {
        "step": step,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
        "metrics": metrics,
        "versions": package_versions(),
        "sha256": hashes,
        "proof": {
            "prompts": list(PROOF_PROMPTS),
            "tokens_sha256": hashlib.sha256(proof[0].tobytes()).hexdigest(),
            "pixels_sha256": hashlib.sha256(proof[1].tobytes()).hexdigest(),
        },
    }
