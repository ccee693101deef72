"""Name a policy's tensors as published, and fill them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagerl.models.blip3o_next.building import build_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import EDIT_CONNECTOR, EDIT_UNUSED, VISION_TOWER
from imagerl.models.common.shards import Shards, require_finite
from imagerl.rl.errors import why
from imagerl.rl.types import ImageRLError

Slot = tuple[nn.Module, str]  # a module and the name of a parameter or buffer of its own

HEAD = "lm_head.weight"
# Tensors that published checkpoints may hold and no picture depends on.
UNUSED = (EDIT_UNUSED, "model.tar_siglip_features_connector.")
COMPUTED = "rotary_emb.inv_freq"  # old versions of transformers stored it
PARTS = {
    "model.embed_tokens.": "the language model",
    "model.layers.": "the language model",
    "model.norm.": "the language model",
    HEAD: "the language model",
    "model.diffusion_connector.": "the connector",
    "model.sana.": "the decoder",
    "model.sana_vae.": "the autoencoder",
    VISION_TOWER: "the vision tower",
    EDIT_CONNECTOR: "the edit connector",
    "image_tokenizer.": "the image tokenizer",
}


def empty_policy(config: Mapping[str, Any], text_tokenizer: Any) -> ImagePolicy:
    """Build a policy without memory for parameters: they have shapes only, while buffers are real.

    Raises ImageRLError when its parts do not go together."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            policy = build_policy(config, text_tokenizer)
    except ImageRLError:
        raise
    except Exception as error:  # what transformers and diffusers say of sizes that do not go together
        raise ImageRLError(f"config.json describes no model that can be built ({why(error)})") from error
    if is_tied(policy):  # each parameter was replaced on its own
        policy.trainable.lm.tie_weights()
    return policy


def module_prefixes(policy: ImagePolicy) -> dict[str, nn.Module]:
    """Return each part by its prefix in the published key layout."""
    parts: dict[str, nn.Module] = {
        "model.diffusion_connector.": policy.decoder.connector,
        "model.sana.": policy.decoder.sana,
        "model.sana_vae.": policy.decoder.vae,
    }
    if policy.decoder.reference_connector is not None:
        parts[EDIT_CONNECTOR] = policy.decoder.reference_connector
    if policy.decoder.unused_connector is not None:
        parts[EDIT_UNUSED] = policy.decoder.unused_connector
    if policy.image_tokenizer is not None:
        parts[policy.image_tokenizer.key_prefix] = policy.image_tokenizer
    return parts


def is_tied(policy: ImagePolicy) -> bool:
    return bool(policy.trainable.lm.config.tie_word_embeddings)


def slots(policy: ImagePolicy) -> dict[str, Slot]:
    """Map each stored tensor's key to its place. A tied head is not stored; adapters must not be on."""
    found: dict[str, Slot] = {}
    for prefix, part in {"": policy.trainable.lm, **module_prefixes(policy)}.items():
        for path, module in part.named_modules():
            names = [name for name, parameter in module._parameters.items() if parameter is not None]
            names += [
                name
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in module._non_persistent_buffers_set
            ]
            found |= {prefix + (f"{path}.{name}" if path else name): (module, name) for name in names}
    if is_tied(policy):
        found.pop(HEAD, None)
    return found


def language_model_state(policy: ImagePolicy) -> dict[str, Tensor]:
    """Return the language model's own keys, adapters merged; a tied head is not stored twice."""
    from imagerl.models.common.token_sampler import effective_weight

    state: dict[str, Tensor] = {}
    adapted = {name for name, module in policy.trainable.lm.named_modules() if hasattr(module, "base_layer")}
    for name, tensor in policy.trainable.lm.state_dict().items():
        if any(name.startswith(prefix + ".") for prefix in adapted):
            continue
        state[name] = tensor
    for name in adapted:
        state[f"{name}.weight"] = effective_weight(policy.trainable.lm.get_submodule(name))
    if is_tied(policy):
        state.pop(HEAD, None)
    return state


def full_state(policy: ImagePolicy) -> dict[str, Tensor]:
    """Return every tensor of the generator under its published key: views where possible, not copies."""
    state = language_model_state(policy)
    for prefix, module in module_prefixes(policy).items():
        state.update({prefix + name: tensor for name, tensor in module.state_dict().items()})
    return {name: tensor.detach() for name, tensor in state.items()}


def fill(policy: ImagePolicy, shards: Shards, dtype: torch.dtype, device: torch.device | str) -> None:
    """Read a checkpoint into an `empty_policy`, tensor by tensor, floating-point numbers as `dtype`.

    The memory this needs is that of the policy and of one tensor, whatever the checkpoint's size. Raises ImageRLError
    for a tensor that holds other than finite numbers."""
    wanted = slots(policy)
    for name in shards.in_order():
        if name in wanted:
            module, leaf = wanted[name]
            stored = shards.read(name)
            if stored.is_floating_point() != getattr(module, leaf).is_floating_point():
                raise ImageRLError(
                    f"{shards.folder}: {name} is stored as {stored.dtype}; copy the model again"
                )
            tensor = stored.to(dtype) if stored.is_floating_point() else stored
            _put(module, leaf, require_finite(tensor, f"{shards.folder}: {name}"), dtype, device)
    if is_tied(policy):
        policy.trainable.lm.tie_weights()


def fill_randomly(policy: ImagePolicy, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
    """Give an `empty_policy` weights that keep the size of what passes through them: for measuring speed."""
    numbers = torch.Generator(device).manual_seed(seed)
    for name, (module, leaf) in slots(policy).items():
        if leaf not in module._parameters:
            continue
        tensor = torch.empty(getattr(module, leaf).shape, dtype=dtype, device=device)
        if tensor.ndim > 1:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=numbers)
        else:
            tensor.fill_(float(name.endswith("weight")))
        _put(module, leaf, tensor, dtype, device)
    if is_tied(policy):
        policy.trainable.lm.tie_weights()


def _put(
    module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str
) -> None:
    tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def load_state(policy: ImagePolicy, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors of our layout into a policy that has weights already. Raises as `check_fit` does."""
    check_fit(policy, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    with torch.no_grad():
        for name, (module, leaf) in slots(policy).items():
            getattr(module, leaf).copy_(state[name])


def check_fit(
    policy: ImagePolicy,
    shapes: Mapping[str, tuple[int, ...]],
    source: Path,
    published: Mapping[str, Any] | None = None,
) -> list[str]:
    """Refuse a checkpoint whose tensors are not the policy's. `published` is its config.json where it is of the
    published layout: that may hold tensors which belong to no part. Returns what is worth knowing of those.

    Raises ImageRLError with one line that says what is missing, unknown or of another shape, and how many."""
    wanted = {name: tuple(getattr(*slot).shape) for name, slot in slots(policy).items()}
    missing = sorted(wanted.keys() - shapes.keys())
    extra = shapes.keys() - wanted.keys() - ({HEAD} if is_tied(policy) else set())
    foreign: list[str] = []
    if published is not None:
        extra = {name for name in extra if not name.startswith(UNUSED) and not name.endswith(COMPUTED)}
        foreign = sorted(name for name in extra if not _part_of(name))
    unknown = sorted(extra - set(foreign))
    if missing or unknown:
        parts = [
            f"{len(names)} {what} such as {names[0]}{f' of {_part_of(names[0])}' if _part_of(names[0]) else ''}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ImageRLError(f"{source} does not fit its config.json: tensors {', '.join(parts)}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ImageRLError(f"{source}: {name} is {shapes[name]}, config.json says {shape}")
    notes: list[str] = []
    if published is not None:
        if not _has(shapes, VISION_TOWER):
            notes.append("it has no vision tower, so pictures can be neither tokenised nor edited")
        if published.get("use_und_image_vae") and not _has(shapes, EDIT_CONNECTOR):
            notes.append("it has no edit connector, so pictures cannot be edited")
        if is_tied(policy) and HEAD in shapes:
            notes.append(f"its {HEAD} is not used: config.json ties the head to the embedding")
        if foreign:
            notes.append(
                f"{len(foreign)} tensors such as {foreign[0]} belong to no part of it and are not used"
            )
    return notes


def _part_of(name: str) -> str:
    return next((words for prefix, words in PARTS.items() if name.startswith(prefix)), "")


def _has(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)
