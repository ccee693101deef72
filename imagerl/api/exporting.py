"""From a run to a model folder that others can load, proved equal before it is called done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagerl.models.base import Policy, Proof
from imagerl.models.common.adapters import adapter_base
from imagerl.models.common.settings import stored_sampling
from imagerl.models.families import base_folder, family_of, load_policy, model_folder
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.sft import AnyRecipe, SFTRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    package_versions,
    step_of,
)
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics, to_json
from imagerl.rl.files.writing import atomic_folder
from imagerl.rl.rollout.engine import RolloutEngine, evaluation_sampling
from imagerl.rl.sft.objective import sft_module
from imagerl.rl.training.halves import trained_module
from imagerl.rl.types import Prompt

PROOF_PROMPTS = (
    Prompt(0, 'a sign that says "RIVER" in red on a white background'),
    Prompt(1, 'a sign that says "472" in blue on a yellow background'),
)
PROOF_SEED = 20_240_203
PROVENANCE = "provenance.json"


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


def recipe_of(source: Path) -> tuple[AnyRecipe, Checkpoint]:
    """Return a checkpoint, and the recipe of its run."""
    checkpoint = load_checkpoint(checkpoint_of(source))
    stored = dict(checkpoint.state["recipe"])
    schema = SFTRecipe if stored.get("kind") == "sft" else Recipe
    recipe = validate_recipe(schema, stored, f"{checkpoint.folder}/state.json")
    assert isinstance(recipe, AnyRecipe)
    return recipe, checkpoint


def trained_policy(recipe: AnyRecipe, checkpoint: Checkpoint) -> Policy:
    """Load the policy as it was at a checkpoint. Its own settings are those by which the run drew what it was judged
    by; supervised training leaves them as the model had them."""
    policy = load_policy(recipe.model.path, family=recipe.model.family)
    module = sft_module(policy, recipe) if isinstance(recipe, SFTRecipe) else trained_module(policy, recipe)
    load_trained(module, checkpoint.tensors["model"])
    if policy.flow is not None:
        policy.flow.merge_lora()
    if isinstance(recipe, Recipe):
        policy.sampling = replace(evaluation_sampling(recipe), shared_noise=False)
    return policy


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
def proof_samples(policy: Policy) -> dict[str, Tensor]:
    """Return tokens [P, T] and pixels [P, 3, H, W] of fixed prompts and random numbers: what an export must repeat."""
    policy.refresh_sampler()
    rollout = RolloutEngine(policy, policy.sampling, PROOF_SEED, nullcontext)
    uniforms, noise = rollout.uniforms("proof", PROOF_PROMPTS, 1), rollout.noise("proof", PROOF_PROMPTS, 1)
    prompts = policy.encode(PROOF_PROMPTS)
    trajectory = policy.sample_tokens(prompts, uniforms, policy.sampling)
    pixels = policy.decode(prompts, trajectory, noise, policy.sampling)
    return {"tokens": trajectory.tokens, "pixels": pixels}


def proof_of(policy: Policy, folder: Path, layout: str, family: str | None) -> Proof:
    """Return quantities that a policy computes, and the same from its written form, loaded as its users will."""
    partial = policy.proof(folder, layout, PROOF_PROMPTS)
    if partial is not None:
        return partial
    ours, theirs = proof_samples(policy), proof_samples(load_policy(str(folder), family=family))
    return {name: (value, theirs[name]) for name, value in ours.items()}


def round_weights(policy: Policy, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can store, so that the export is compared with what it will hold."""
    for module in policy.parts().values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def export(
    source: Path,
    target: Path,
    adapter_only: bool = False,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Write the policy of a run or checkpoint in one of its family's layouts and return its provenance.

    The folder appears only once it has been loaded back and has repeated exactly what the policy does: tokens and
    pixels, or the logits or pixels of the half that was written. With LoRA the adapters are merged, or with
    `adapter_only` kept as a PEFT adapter beside the path of what it stands on: what the run began from, or the base of
    that where the run went on training its adapter. Those of a trained decoder are always merged.

    Raises ImageRLError when `target` exists, the source has no checkpoint, or the proof fails."""
    if target.exists():
        raise ImageRLError(f"{target} exists already; give another folder, or remove it first")
    recipe, checkpoint = recipe_of(source)
    layouts = family_of(base_folder(recipe.model.path), recipe.model.family).layouts
    own = next(iter(layouts))
    layout = layout or own
    if layout not in layouts:
        raise ImageRLError(f"there is no layout {layout!r}; choose one of {', '.join(layouts)}")
    if adapter_only and layout != own:
        raise ImageRLError(f"an adapter has a layout of its own; export without --layout {layout}")
    policy = trained_policy(recipe, checkpoint)
    if adapter_only and policy.flow is not None:
        raise ImageRLError(
            "the run trained the decoder, which no adapter file holds; export without --adapter"
        )
    if adapter_only and not policy.adapted:
        raise ImageRLError("the run trained no LoRA adapter; export without --adapter")
    if not adapter_only:
        policy.merge_lora()
    if dtype is not None and not adapter_only:
        round_weights(policy, dtype)
    with atomic_folder(target) as temporary:
        if adapter_only:
            start = recipe.model.path
            continued = isinstance(recipe, Recipe) and recipe.model.lora is None
            base = adapter_base(model_folder(start)) if continued else start
            policy.save_adapter(temporary, base)
        else:
            policy.save(temporary, layout, base_folder(recipe.model.path), dtype)
        proof = proof_of(policy, temporary, layout, recipe.model.family)
        for what, (values, found) in proof.items():
            if not torch.equal(values, found):
                share = float((values != found).float().mean())
                raise ImageRLError(
                    f"the export does not repeat the run's {what} ({share:.1%} differ); nothing was written"
                )
        provenance = describe(recipe, checkpoint.folder, temporary, layout, proof)
        provenance |= {"what": layouts[layout], "sampling": stored_sampling(policy.sampling)}
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
            "prompts": [prompt.text for prompt in PROOF_PROMPTS],
            **{
                f"{name}_sha256": hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
                for name, (value, _) in proof.items()
            },
        },
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
