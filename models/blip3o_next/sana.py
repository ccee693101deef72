"""Compute the velocity of a diffusers SANA transformer (arXiv 2410.10629), with all that depends on the
caption alone computed once per picture instead of once per denoising step.

The modules and their arithmetic are diffusers'; only the cross-attention is spelt out here, because its keys and
values must outlive one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class CaptionKeys:
    """Keys and values of one branch's condition for the cross-attentions of all layers."""

    keys: list[Tensor]  # per layer [B or 1, heads, R, d]
    values: list[Tensor]  # per layer [B or 1, heads, R, d]
    bias: Tensor | None  # [1, R] added to the scores: log of how many equal rows a row stands for


def caption_keys(sana: Any, condition: Tensor, counts: Tensor | None = None) -> CaptionKeys:
    """Compute keys and values of a projected condition [B, R, inner].

    With `counts` [R], row r stands for that many equal rows: softmax over n equal scores s is softmax over the
    one score s + log n."""
    keys, values = [], []
    for block in sana.transformer_blocks:
        attention = block.attn2
        key = attention.to_k(condition)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        keys.append(_heads(attention, key))
        values.append(_heads(attention, attention.to_v(condition)))
    return CaptionKeys(keys, values, None if counts is None else counts.log()[None].to(condition.dtype))


def velocity(sana: Any, latents: Tensor, sigma: Tensor, branches: Sequence[CaptionKeys]) -> Tensor:
    """Return the velocity [B, C, h, w] of latents [B, C, h, w] at noise levels `sigma` [B]. The batch is as many
    equal parts as there are branches, one after the other.

    After `sana.enable_gradient_checkpointing()` only the inputs of the blocks are kept for the backward pass."""
    batch, _, height, width = latents.shape
    patch = sana.config.patch_size
    rows, columns = height // patch, width // patch
    x = sana.patch_embed(latents.to(sana.dtype))
    timestep, embedded = sana.time_embed(sigma * 1000.0, batch_size=batch, hidden_dtype=x.dtype)
    for layer, block in enumerate(sana.transformer_blocks):
        arguments = (block, x, timestep.view(batch, 6, -1), branches, layer, rows, columns)
        if sana.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, *arguments, use_reentrant=False)
        else:
            x = _block(*arguments)
    x = sana.proj_out(sana.norm_out(x, embedded, sana.scale_shift_table))
    x = x.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, height, width)


def _block(
    block: Any,
    x: Tensor,
    timestep: Tensor,
    branches: Sequence[CaptionKeys],
    layer: int,
    rows: int,
    columns: int,
) -> Tensor:
    """Apply one transformer block to x [B, rows·columns, D]."""
    modulation = block.scale_shift_table[None] + timestep
    shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
    normed = block.norm1(x) * (1 + scale_sa) + shift_sa
    x = x + gate_sa * block.attn1(normed.to(x.dtype))
    x = _cross_attention(block.attn2, x, branches, layer) + x
    normed = block.norm2(x) * (1 + scale_ff) + shift_ff
    grid = normed.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    return x + gate_ff * block.ff(grid).flatten(2, 3).permute(0, 2, 1)


def _cross_attention(attention: Any, x: Tensor, branches: Sequence[CaptionKeys], layer: int) -> Tensor:
    query = attention.to_q(x)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    attended = []
    for part, branch in zip(_heads(attention, query).chunk(len(branches)), branches, strict=True):
        key, value = (kept[layer].expand(len(part), -1, -1, -1) for kept in (branch.keys, branch.values))
        attended.append(F.scaled_dot_product_attention(part, key, value, attn_mask=branch.bias))
    joined = torch.cat(attended).transpose(1, 2).flatten(2).to(query.dtype)
    return attention.to_out[0](joined) / attention.rescale_output_factor


def _heads(attention: Any, x: Tensor) -> Tensor:
    """Reshape [B, R, heads·d] to [B, heads, R, d]."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
