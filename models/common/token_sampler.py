"""Draw image tokens: one prefill per prompt, then one small step per token for all samples at once.

transformers' `generate` spends most of a small model's time outside the matrix products, prefills a shared
prompt once per sample and forgets the hidden states. Here the weights are laid out once per rollout (fused
projections, adapters merged, norms folded), the prompt's keys and values are kept once per group, and the same
pass yields tokens, their log-probs and the hidden states that condition the decoder. With guidance on the logits a
sample is two sequences, of its prompt and of the unconditional one, that go on with the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.common.tokens import Logits, PromptIds, draw_tokens, guided_logits, positions_of
from imagerl.rl.types import TokenTrajectory


def effective_weight(linear: Any) -> Tensor:
    """Return the weight a linear layer acts with now: LoRA deltas included unless adapters are off."""
    if not hasattr(linear, "base_layer"):
        return linear.weight.detach()
    weight: Tensor = linear.base_layer.weight.detach()
    if not linear.disable_adapters and not linear.merged:
        for name in linear.active_adapters:
            weight = weight + linear.get_delta_weight(name).detach()
    return weight


@dataclass(slots=True)
class _Layer:
    """One decoder layer's weights. A norm's scale is folded into the projection that follows it."""

    qkv: Tensor  # [(Hq + 2·Hkv)·d, D]; without `qk_scale` 1/sqrt(d) is in the query's rows
    qk_scale: Tensor | None  # [Hq + Hkv, d] per-head norms, the query's with 1/sqrt(d); None: there are none
    out: Tensor  # [D, Hq·d]
    gate_up: Tensor  # [2·I, D]
    down: Tensor  # [D, I]


@dataclass(slots=True)
class _Cache:
    """Keys and values of one layer, in float of the compute type."""

    prompt_keys: Tensor  # [P, Hkv, d, L] transposed for the product with queries
    prompt_values: Tensor  # [P, Hkv, L, d]
    keys: Tensor  # [B, Hkv, d, T + 1]
    values: Tensor  # [B, Hkv, T + 1, d]


class TokenSampler:
    """A snapshot of a language model of Llama's or Qwen3's kind that writes image tokens. Make a new one after every
    update of the weights."""

    def __init__(
        self,
        model: Any,
        image_embedding: Tensor,
        image_logits: Logits,
        dtype: torch.dtype = torch.float32,
        layers: list[_Layer] | None = None,
    ) -> None:
        """Lay out `model`, transformers' stack of layers without a head, or take the `layers` of another sampler of it.
        Image token t is read as row t of `image_embedding` [V, D], and `image_logits` makes logits [..., V] of
        final-norm hidden states in `dtype`."""
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = model.layers[0].self_attn.head_dim, config.rms_norm_eps
        self.dtype = dtype
        self.inv_freq = model.rotary_emb.inv_freq.float()
        self.embedding = model.embed_tokens.weight.detach()
        self.image_embedding = image_embedding.detach()
        self.final_norm = model.norm.weight.detach()
        self.image_logits = image_logits
        self.layers = layers or [self._pack(layer) for layer in model.layers]

    def _pack(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norm_in, norm_mlp = (
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
        )
        qkv = torch.cat([effective_weight(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        scale, qk_scale = self.head_dim**-0.5, None
        if hasattr(attention, "q_norm"):
            queries = (attention.q_norm.weight * scale).expand(self.heads, -1)
            keys = attention.k_norm.weight.expand(self.kv_heads, -1)
            qk_scale = torch.cat([queries, keys]).detach().to(self.dtype)
        else:
            qkv[: self.heads * self.head_dim] *= scale
        gate_up = torch.cat([effective_weight(mlp.gate_proj), effective_weight(mlp.up_proj)])
        return _Layer(
            qkv=(qkv * norm_in).to(self.dtype),
            qk_scale=qk_scale,
            out=effective_weight(attention.o_proj).to(self.dtype),
            gate_up=(gate_up * norm_mlp).to(self.dtype),
            down=effective_weight(mlp.down_proj).to(self.dtype),
        )

    def sample(
        self,
        prompts: PromptIds,
        uniforms: Tensor,
        temperature: float,
        guidance: float = 1.0,
        keep_hidden: bool = True,
    ) -> TokenTrajectory:
        """Draw T tokens for each of G samples of P prompts, whose unconditional ones are there where `guidance` is
        not 1.

        `uniforms` [P·G, T] in [0, 1), one per token: the draw is the inverse of the cumulative distribution there, so
        a sample depends on its own numbers alone. With `keep_hidden` the trajectory has the hidden states
        [P·G, T + 1, D] of the prompt's last id and of every token, and one more step is made for those of the last."""
        batch, steps = uniforms.shape
        with torch.inference_mode():
            caches, hidden, prompt_mask = self._prefill(prompts, batch, steps)
            prompt_bias = torch.zeros_like(prompt_mask, dtype=self.dtype)
            prompt_bias = prompt_bias.masked_fill(~prompt_mask, float("-inf"))
            padding = prompt_bias[:, None, None, :] if bool((~prompt_mask).any()) else None
            branches = 1 if prompts.rows is None else 2
            group = branches * batch // len(prompt_mask)
            start = prompt_mask.sum(1).repeat_interleave(group)  # position of the first image token
            cos, sin = self._rotation(start[:, None] + torch.arange(steps, device=start.device))

            hidden = hidden.repeat_interleave(group, dim=0)  # [B, D] of the prompt's last id, or [2·B, D]
            all_hidden: list[Tensor] = []
            all_tokens, all_logprobs = [], []
            for step in range(steps):
                logits = guided_logits(self.image_logits, hidden.split(batch), guidance) / temperature
                token, logprob = draw_tokens(logits, uniforms[:, step])
                all_tokens.append(token)
                all_logprobs.append(logprob)
                if keep_hidden:
                    all_hidden.append(hidden[:batch])
                elif step == steps - 1:
                    break
                x = F.embedding(token, self.image_embedding).to(self.dtype).repeat(branches, 1)
                turn = (cos[:, step, None], sin[:, step, None])
                for layer, cache in zip(self.layers, caches, strict=True):
                    x = self._decode_layer(layer, cache, x, turn, padding, step)
                hidden = self._final(x)
        tokens = torch.stack(all_tokens, dim=1)  # out here, so that autograd may keep what is returned
        return TokenTrajectory(
            tokens=tokens,
            rollout_logprobs=torch.stack(all_logprobs, dim=1),
            action_mask=torch.ones_like(tokens, dtype=torch.bool),
            states={"hidden": torch.stack([*all_hidden, hidden[:batch]], dim=1)} if keep_hidden else {},
        )

    def _final(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.dtype) * self.final_norm.to(
            self.dtype
        )

    def _normed(self, x: Tensor) -> Tensor:
        """Apply RMS norm without its scale, which is folded into the next projection."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.dtype)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [..., 1, d] of the rotary embedding; the sign of its half turn is in sin."""
        angles = positions[..., None].float() * self.inv_freq
        sin = angles.sin()
        cos = angles.cos()
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)

    def _queries_keys_values(
        self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [..., D] to queries [..., Hq, d], keys and values [..., Hkv, d], rotated."""
        qkv = F.linear(self._normed(x), layer.qkv).unflatten(-1, (-1, self.head_dim))
        qk, values = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        if layer.qk_scale is not None:
            qk = F.rms_norm(qk.float(), (self.head_dim,), eps=self.eps).to(self.dtype) * layer.qk_scale
        qk = qk * cos + qk.roll(self.head_dim // 2, -1) * sin
        queries, keys = qk.split([self.heads, self.kv_heads], dim=-2)
        return queries, keys, values

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(self._normed(x), layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _prefill(self, prompts: PromptIds, batch: int, steps: int) -> tuple[list[_Cache], Tensor, Tensor]:
        """Read every prompt once; returns, for each branch of each prompt, the caches, the last position's final
        hidden state and the mask."""
        ids, mask, rows = prompts.ids, prompts.mask.bool(), prompts.rows
        length = ids.shape[1]
        cos, sin = (t[:, :, None] for t in self._rotation(positions_of(mask)))
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        # A padded row attends to itself, so that its softmax is not empty; nobody reads its output.
        visible = (causal & mask[:, None, :]) | torch.eye(length, dtype=torch.bool, device=ids.device)
        x = F.embedding(ids, self.embedding).to(self.dtype)
        sequences = batch if rows is None else 2 * batch
        caches = []
        for layer in self.layers:
            queries, keys, values = (t.transpose(1, 2) for t in self._queries_keys_values(layer, x, cos, sin))
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=visible[:, None], scale=1.0, enable_gqa=True
            )
            x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.out)
            x = self._mlp(layer, x)
            keys, values = (t if rows is None else t[rows] for t in (keys, values))
            shape = (sequences, self.kv_heads, self.head_dim, steps)
            caches.append(
                _Cache(
                    prompt_keys=keys.transpose(2, 3).contiguous(),
                    prompt_values=values.contiguous(),
                    keys=x.new_zeros(shape),
                    values=x.new_zeros(shape).transpose(2, 3).contiguous(),
                )
            )
        last = self._final(x[:, -1])
        return caches, *((last, mask) if rows is None else (last[rows], mask[rows]))

    def _decode_layer(
        self,
        layer: _Layer,
        cache: _Cache,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        padding: Tensor | None,
        step: int,
    ) -> Tensor:
        """Pass one token through one layer: x [B, D] -> [B, D]. Scores against the prompt are one product per
        prompt for its whole group; scores against the sample's own tokens are one per sample; one softmax joins
        them."""
        queries, keys, values = self._queries_keys_values(layer, x, *turn)
        cache.keys[:, :, :, step] = keys
        cache.values[:, :, step] = values
        batch, prompts = x.shape[0], cache.prompt_keys.shape[0]
        group, repeat = batch // prompts, self.heads // self.kv_heads
        own_queries = queries.view(batch, self.kv_heads, repeat, self.head_dim)
        own = own_queries @ cache.keys[:, :, :, : step + 1]
        grouped = own_queries.view(prompts, group, self.kv_heads, repeat, self.head_dim).transpose(1, 2)
        shared = grouped.reshape(prompts, self.kv_heads, group * repeat, self.head_dim) @ cache.prompt_keys
        if padding is not None:
            shared = shared + padding
        length = shared.shape[-1]
        shared = shared.view(prompts, self.kv_heads, group, repeat, length).transpose(1, 2)
        scores = torch.cat([shared.reshape(batch, self.kv_heads, repeat, length), own], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(self.dtype)
        on_prompt, on_own = weights.split([length, step + 1], dim=-1)
        on_prompt = on_prompt.reshape(prompts, group, self.kv_heads, repeat, length).transpose(1, 2)
        from_prompt = on_prompt.reshape(prompts, self.kv_heads, group * repeat, length) @ cache.prompt_values
        from_prompt = from_prompt.view(prompts, self.kv_heads, group, repeat, self.head_dim).transpose(1, 2)
        from_own = on_own @ cache.values[:, :, : step + 1]
        attended = from_prompt.reshape(batch, -1) + from_own.reshape(batch, -1)
        return self._mlp(layer, x + F.linear(attended, layer.out))
