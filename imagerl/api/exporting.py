"""From a run to a model folder that others can load, proved equal before it is called done."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from imagerl.models.base import Policy, Proof
from imagerl.models.common.adapters import adapter_base
from imagerl.models.common.hub import SHIPPED
from imagerl.models.common.settings import stored_sampling
from imagerl.models.common.shards import WEIGHTS, Shards
from imagerl.models.families import base_folder, family_of, load_policy, model_folder
from imagerl.rl.config.recipe import load_yaml_recipe, validate_recipe
from imagerl.rl.config.sft import AnyRecipe, SFTRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    package_versions,
    sha256_of,
    step_of,
)
from imagerl.rl.engine.engine import AVERAGE
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics, to_json
from imagerl.rl.files.writing import atomic_folder, remove_folder, wait_for
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.rollout.preparing import evaluation_sampling
from imagerl.rl.run.folder import EXPORTS, MODEL, RECIPE_FILE
from imagerl.rl.sft.objective import lessons_for
from imagerl.rl.training.halves import trained_halves, trained_module
from imagerl.rl.types import Prompt

PROOF_PROMPTS = 2  # by default
PROOF_SEED = 20_240_203
PROVENANCE = "provenance.json"
RunRecipe = TypeVar("RunRecipe", Recipe, SFTRecipe)
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def checkpoint_of(source: Path) -> Path:
    """Return the checkpoint that a run folder or a checkpoint folder means.

    Raises ImageRLError when `source` is neither, or the run has no checkpoint yet."""
    source = source.resolve()  # the run is found above its checkpoint, wherever we are
    if source.name.startswith("step_"):
        if _is_gone(source):
            kept = ", ".join(folder.name for folder in list_checkpoints(source.parent)) or "none"
            raise ImageRLError(f"there is no checkpoint {source}; kept are: {kept}")
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


def _is_gone(place: Path) -> bool:
    """Tell whether a checkpoint is named that is not, or no longer, in its folder."""
    return place.name.startswith("step_") and not place.is_dir() and place.parent.is_dir()


def is_run(path: str) -> bool:
    """Tell whether a `model.path` is a run's, or that of one of its checkpoints."""
    place = Path(path).expanduser()
    marks = place / CHECKPOINTS, place / MANIFEST, place / MODEL / "config.json"
    return path not in SHIPPED and (_is_gone(place) or any(mark.exists() for mark in marks))


def as_model(path: str) -> str:
    """Return what `load_policy` reads: the path of a model or adapter as it is, and for a run or one of its checkpoints
    the export of that, which is made once and kept in the run folder."""
    place = Path(path).expanduser()
    if not is_run(path):
        return path
    if (place / MODEL / "config.json").is_file():  # of supervised training
        return str(place / MODEL)
    checkpoint = checkpoint_of(place)
    target = checkpoint.parents[1] / EXPORTS / checkpoint.name
    if os.environ.get("RANK", "0") != "0":
        wait_for(target / PROVENANCE)
        return str(target)
    if target.is_dir() and target.stat().st_mtime < (checkpoint / MANIFEST).stat().st_mtime:
        remove_folder(target)  # of a run that was made again
    if not target.is_dir():
        print(f"imagerl: {path} is a run's; making a model of it in {target}", file=sys.stderr)
        export(checkpoint, target)
    return str(target)


def with_model(recipe: RunRecipe, resumed: bool = False) -> RunRecipe:
    """Return a recipe whose `model.path` is `as_model`'s. A resumed run keeps the one that it began from, whatever the
    run that this is of has made since."""
    stored = Path(recipe.run.output_dir) / RECIPE_FILE
    if resumed and stored.is_file():
        began, given = load_yaml_recipe(type(recipe), stored).model.path, Path(recipe.model.path).resolve()
        run = Path(began).resolve().parents[Path(began).parent.name == EXPORTS]
        ours = Path(began).parent.name == EXPORTS or Path(began).name == MODEL
        path = began if ours and given.is_dir() and given.is_relative_to(run) else recipe.model.path
    else:
        path = as_model(recipe.model.path)
    model = recipe.model.model_copy(update={"path": path})
    return recipe.model_copy(update={"model": model})


def recipe_of(source: Path) -> tuple[AnyRecipe, Checkpoint]:
    """Return a checkpoint, verified, its tensors not read, and the recipe of its run."""
    checkpoint = load_checkpoint(checkpoint_of(source), groups=("model", AVERAGE), read=False)
    stored = dict(checkpoint.state["recipe"])
    schema = SFTRecipe if stored.get("kind") == "sft" else Recipe
    recipe = validate_recipe(schema, stored, f"{checkpoint.folder}/state.json")
    assert isinstance(recipe, AnyRecipe)
    return recipe, checkpoint


def trained_policy(
    recipe: AnyRecipe,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    merge_decoder: bool = True,
) -> Policy:
    """Load the policy as it was at a checkpoint, adapters of its decoder merged or kept. Its own settings are those by
    which the run drew what it was judged by; supervised training leaves them as the model had them."""
    policy = load_policy(recipe.model.path, device, family=recipe.model.family)
    module = (
        lessons_for(policy, recipe).trainable
        if isinstance(recipe, SFTRecipe)
        else trained_module(policy, recipe)
    )
    average = f"{AVERAGE}.safetensors"
    weights = average if (checkpoint.folder / average).is_file() else WEIGHTS
    load_trained(module, Shards(checkpoint.folder, weights))
    if policy.flow is not None and merge_decoder:
        policy.flow.merge_lora()
    if isinstance(recipe, Recipe):
        policy.sampling = replace(evaluation_sampling(recipe), shared_noise=False)
    return policy


def load_trained(module: nn.Module, weights: Shards) -> None:
    """Put a checkpoint's weights, named as the trained module names its parameters, into that module, one at a time.

    Raises ImageRLError when they belong to another model."""
    parameters = dict(module.named_parameters())
    for name in weights.in_order():
        if name not in parameters or parameters[name].shape != weights.shapes[name]:
            raise ImageRLError(
                f"the checkpoint's {name} does not fit the model; was model.path replaced since?"
            )
        parameters[name].data.copy_(weights.read(name))


def proof_prompts(count: int) -> list[Prompt]:
    """Return the first `count` prompts that are drawn for a proof."""
    texts = ['"RIVER" in red on a white', '"472" in blue on a yellow']
    texts += [f'"{number}" in black on a white' for number in range(count)]
    return [Prompt(i, f"a sign that says {text} background") for i, text in enumerate(texts[:count])]


@torch.no_grad()
def proof_samples(policy: Policy, prompts: Sequence[Prompt] | None = None) -> dict[str, Tensor]:
    """Return tokens [P, T] and pixels [P, 3, H, W] of prompts with fixed random numbers: what an export must repeat.
    None: those of a proof by default."""
    prompts = proof_prompts(PROOF_PROMPTS) if prompts is None else prompts
    if not prompts:
        return {}
    policy.refresh_sampler()
    rollout = RolloutEngine(policy, policy.sampling, PROOF_SEED, nullcontext)
    encoded, _, trajectory = rollout.trajectory(prompts, 1, "proof")
    pixels = policy.decode(encoded, trajectory, rollout.noise("proof", prompts, 1), policy.sampling)
    return {"tokens": trajectory.tokens.cpu(), "pixels": pixels.cpu()}


def weights_digest(policy: Policy) -> Tensor:
    """Return the SHA-256 of every weight of a policy and its name, as 32 bytes."""
    digest = hashlib.sha256()
    for part in policy.parts().values():
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def round_weights(policy: Policy, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can store, so that the export is compared with what it will hold."""
    for module in policy.parts().values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


class ExportResult:
    """A model folder that has been written and proved, with its provenance."""

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.provenance = provenance

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        told = self.provenance
        proved = " and ".join(key.removesuffix("_sha256") for key in told["proof"] if key != "prompts")
        end = f"reloaded and proved equal in {proved}" if proved else "reloaded"
        return f"{self.folder}: step {told['step']}, {told['what']}; {end}"


def check_storage(dtype: str, device: str) -> None:
    """Raise ImageRLError for a storage type or a device that there is not."""
    if dtype not in DTYPES:
        raise ImageRLError(f"dtype must be fp32 or bf16, not {dtype!r}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ImageRLError(f"device must be cpu, or cuda where there is a GPU, not {device!r}")


def export(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    adapter: bool = False,
    dtype: str = "fp32",
    layout: str | None = None,
    device: str = "cpu",
    proof: int = PROOF_PROMPTS,
) -> ExportResult:
    """Write the policy of a run or checkpoint as a model folder, weights stored as fp32 or bf16; `layout` is one of its
    family's, None: the one to go on with; see `write_export`.

    Raises ImageRLError like that."""
    check_storage(dtype, device)
    folder = Path(target)
    return ExportResult(
        folder, write_export(Path(source), folder, adapter, DTYPES[dtype], layout, device, proof)
    )


def write_export(
    source: Path,
    target: Path,
    adapter_only: bool = False,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    device: torch.device | str = "cpu",
    proof: int = PROOF_PROMPTS,
) -> dict[str, Any]:
    """Write the policy of a run or checkpoint in one of its family's layouts and return its provenance.

    The folder appears only once it has been loaded back and has repeated exactly what the policy is and does: its
    weights, and the tokens and pixels of `proof` prompts, or the logits or pixels of the half that was written. With
    LoRA the adapters are merged, or with `adapter_only` kept as a PEFT adapter beside the path of what it stands on:
    what the run began from, or the base of that where the run went on training its adapter. That of a decoder which was
    trained alone is kept as diffusers reads it.

    Host memory is that of one policy in float32 and a tenth more; with `proof` that of the sampler's copy comes on top.
    On another `device` it is that of a few tensors.

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
    if adapter_only and dtype is not None:
        raise ImageRLError("an adapter is stored as it was trained, in float32; export without --dtype")
    policy = trained_policy(recipe, checkpoint, device, merge_decoder=not adapter_only)
    if adapter_only:
        refuse_more_than_an_adapter(recipe, policy)
    else:
        policy.merge_lora()
    if dtype is not None:
        round_weights(policy, dtype)
    start, decoder = recipe.model.path, policy.flow if adapter_only else None
    kind = f"a LoRA adapter in the layout of {'diffusers' if decoder else 'PEFT'}"
    with atomic_folder(target) as temporary:
        if decoder is not None:
            decoder.save_adapter(temporary)
        elif adapter_only:
            continued = isinstance(recipe, Recipe) and recipe.model.lora is None
            base = adapter_base(model_folder(start)) if continued else start
            policy.save_adapter(temporary, base)
        else:
            policy.save(temporary, layout, base_folder(start), dtype)
        prompts, family, sampling = proof_prompts(proof), recipe.model.family, policy.sampling
        pairs = policy.proof(temporary, layout, prompts or proof_prompts(1))
        if pairs is None:
            ours = proof_samples(policy, prompts)
            if layout == own and not adapter_only:  # other layouts may leave parts out
                ours["weights"] = weights_digest(policy)
            adapts = decoder is not None
            del policy, decoder  # before the written one needs its memory
            gc.collect()
            again = load_policy(start if adapts else str(temporary), device, family=family)
            if adapts:
                again.merge_lora()  # as under a decoder that trains alone
                again.train_decoder().load_adapter(temporary)
                again.sampling = sampling
            theirs = proof_samples(again, prompts)
            theirs |= {"weights": weights_digest(again)} if "weights" in ours else {}
            pairs = {name: (value, theirs[name]) for name, value in ours.items()}
        for what, (values, found) in pairs.items():
            if not torch.equal(values, found):
                share = float((values != found).float().mean())
                raise ImageRLError(
                    f"the export does not repeat the run's {what} ({share:.1%} differ); nothing was written"
                )
        provenance = describe(recipe, checkpoint.folder, temporary, layout, pairs, prompts)
        provenance |= {
            "what": kind if adapter_only else layouts[layout],
            "sampling": stored_sampling(sampling),
        }
        (temporary / PROVENANCE).write_text(to_json(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def refuse_more_than_an_adapter(recipe: AnyRecipe, policy: Policy) -> None:
    """Raise ImageRLError when an adapter file would not hold all that a run has trained."""
    if isinstance(recipe, Recipe):
        both = len(trained_halves(recipe)) > 1
    else:
        both = {recipe.train.connector, recipe.train.decoder} != {"frozen"}
    if both:
        told = "the run trained tokens and decoder, and an adapter file holds one of them"
        raise ImageRLError(f"{told}; export without --adapter")
    if not (policy.flow or policy).adapted:
        raise ImageRLError("the run trained no LoRA adapter; export without --adapter")


def describe(
    recipe: AnyRecipe, checkpoint: Path, folder: Path, layout: str, proof: Proof, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Tell where a model came from: recipe, step, last metrics, versions, hashes of every file."""
    step = step_of(checkpoint)
    metrics: dict[str, object] = {}
    for record in read_metrics(checkpoint.parent.parent):
        if record["step"] <= step:
            metrics |= record
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    return {
        "step": step,
        "layout": layout,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
        "metrics": metrics,
        "versions": package_versions(),
        "sha256": hashes,
        "proof": {
            "prompts": [prompt.text for prompt in prompts],
            **{
                f"{name}_sha256": hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
                for name, (value, _) in proof.items()
            },
        },
    }
