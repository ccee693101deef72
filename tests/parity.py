"""Fixtures made by the public BLIP3o-NEXT inference code on small seeded weights, and our classes filled with the same.

`IMAGERL_PARITY_DIR` names another folder of such fixtures; sizes, ids and schedule are read from their json."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imagerl.models.blip3o_next.building import build_policy
from imagerl.models.blip3o_next.loading import load_state
from imagerl.models.blip3o_next.policy import ImagePolicy

FOLDER = Path(os.environ.get("IMAGERL_PARITY_DIR") or Path(__file__).parent / "data" / "parity")
VARIANTS = ("t2i", "edit")
SCALING = ".scale_layer."  # left at 0 and 1 by the rule


@dataclass(frozen=True, slots=True)
class Fixture:
    json: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(shape) for key, shape in self.json["keys"]}

    @property
    def prompt_length(self) -> int:
        return int(self.tensors["prompt_length"])

    @property
    def prompt_ids(self) -> Tensor:
        return self.tensors["gen_ids"][:, : self.prompt_length]

    @property
    def tokens(self) -> Tensor:
        """[B, T] 0-based."""
        return (
            self.tensors["gen_ids"][:, self.prompt_length :] - self.json["token_ids"]["image_start_token_id"]
        )

    @property
    def reference(self) -> Tensor | None:
        return self.tensors.get("reference_latents")


def algorithms() -> dict[str, Tensor]:
    """Advantages of verl, steps of flow_grpo, flow losses of verl-omni, on seeded tensors, by name."""
    return load_file(FOLDER / "algorithms.safetensors")


@cache
def fixture(variant: str) -> Fixture:
    document = json.loads((FOLDER / f"{variant}.json").read_text(encoding="utf-8"))
    return Fixture(document, load_file(FOLDER / f"{variant}.safetensors"))


def seeded_weight(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The rule by which the fixtures' weights were made."""
    if SCALING in key:
        return torch.full(shape, float(key.endswith("scale")))
    generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) & 0x7FFFFFFF)
    normal = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * normal + (1 if key.endswith("weight") else 0)
    return normal / normal[0].numel() ** 0.5


def config_of(given: Fixture) -> dict[str, Any]:
    """Our model config for a fixture."""
    document = given.json
    return {
        **{part: document[part] for part in ("qwen3", "sana", "vae", "scheduler")},
        **document["token_ids"],
        "ta_tok": {part: document[part] for part in ("siglip", "bottleneck", "decoder_depth")},
        "edit": document["variant"] == "edit",
        "latent_size": list(given["noise"].shape[-2:]),
        "num_image_positions": given.tokens.shape[1],
        "sampling": {"guidance": document["guidance"], "flow_steps": document["steps"]},
    }


@cache
def policy_of(variant: str) -> ImagePolicy:
    """The fixture's model in our classes. Shared between tests: do not change it. It has no text tokenizer."""
    given = fixture(variant)
    policy = build_policy(config_of(given), None)  # type: ignore[arg-type]
    state = {key: seeded_weight(key, shape, given.json["seed"]) for key, shape in given.shapes.items()}
    load_state(policy, state, FOLDER / f"{variant}.json")
    assert policy.image_tokenizer is not None
    for module in (policy.trainable, policy.decoder, policy.image_tokenizer):
        module.requires_grad_(False).eval()
    return policy
