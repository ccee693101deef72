"""Policies whose every weight matters."""

from __future__ import annotations

import copy
from typing import Any

import torch

from imagerl.models import families
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.common.settings import stored_sampling
from imagerl.rl.types import SamplingParams, TokenTrajectory
from tests.micro import MODEL, micro_policy
from tools.tiny.model import new_policy
from tools.tiny.samples import captions

CAPTIONS = ("CAT", 'a sign that says "42" in red', 'ünïcödé and a much longer caption, padded less: "ZEBRA"')


@torch.no_grad()
def stir(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a size that makes mistakes visible: fresh norms are all ones and fresh projections nearly
    zero, so that a forgotten norm or a wrong head would hardly show."""
    random_numbers = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=random_numbers)
        if parameter.ndim < 2:
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def lively_policy(seed: int = 0, **qwen3: Any) -> ImagePolicy:
    policy, _ = micro_policy(seed, **qwen3)
    stir(policy.trainable, seed)
    return policy


def add_lively_lora(policy: ImagePolicy, seed: int = 1) -> None:
    """LoRA whose adapters are not zero, as after some training."""
    policy.trainable.add_lora(4, 8.0, 0.0, "all-linear")
    random_numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random_numbers))
    policy.trainable.eval()


def random_tokens(policy: ImagePolicy, batch: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, policy.num_actions)
    codes = policy.vocabulary.num_image_tokens
    return torch.randint(codes, shape, generator=torch.Generator().manual_seed(seed))


def uniforms(policy: ImagePolicy, batch: int, seed: int = 0) -> torch.Tensor:
    random_numbers = torch.Generator().manual_seed(seed)
    return torch.rand(batch, policy.num_actions, generator=random_numbers, dtype=torch.float64)


def edit_policy(seed: int = 0) -> tuple[ImagePolicy, dict[str, Any]]:
    """A policy that can edit, every weight of it lively, and its config."""
    torch.manual_seed(seed)
    policy, config = new_policy({**copy.deepcopy(MODEL), "edit": True}, captions(0, 20), 300)
    for module in (policy.trainable, policy.decoder, policy.image_tokenizer):
        assert module is not None
        stir(module, seed)
        module.requires_grad_(False).eval()
    return policy, config


def load_policy(
    path: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ImagePolicy, dict[str, Any]]:
    """A BLIP3o-NEXT policy by way of the registry, and its config."""
    policy = families.load_policy(path, device, dtype)
    assert isinstance(policy, ImagePolicy)
    return policy, policy.config | {"sampling": stored_sampling(policy.sampling)}


def decode(
    policy: ImagePolicy,
    hidden: torch.Tensor,
    noise: torch.Tensor,
    guidance: float,
    steps: int,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pictures of hidden states, whatever tokens they are of."""
    unknown = torch.zeros(len(hidden), 0)
    trajectory = TokenTrajectory(unknown.long(), unknown, unknown.bool(), {"hidden": hidden})
    prompts = {} if reference is None else {"reference": reference}
    sampling = SamplingParams(guidance=guidance, flow_steps=steps)
    return policy.decode(prompts, trajectory, noise, sampling)
