"""The autoregressive half: a Qwen3 language model with image tokens in its vocabulary.

`ARPolicy` scores given tokens with gradients (what the trainer differentiates); drawing new ones is
`models.blip3o_next.ar_sampler`. Both use the same distribution: a softmax over the image columns of the vocabulary
alone, divided by the temperature. Nothing but an image token has any probability inside an image.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagerl.rl.errors import one_line
from imagerl.rl.types import ImageRLError, TokenScores

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

ADAPTER, REFERENCE = "default", "reference"  # names within PEFT: the adapter, and what it was before training
MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once while scoring: 128 MiB, whatever the vocabulary


@dataclass(frozen=True, slots=True)
class ImageVocabulary:
    """The image's place in the text vocabulary; the fields of the published config.json."""

    image_start_tag_id: int
    image_end_tag_id: int
    scale_start_token_id: int
    scale_end_token_id: int
    num_scale_tokens: int
    image_start_token_id: int
    image_end_token_id: int
    num_image_tokens: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageVocabulary:
        missing = [f.name for f in fields(cls) if f.name not in config]
        if missing:
            raise ImageRLError(
                f"config.json lacks {', '.join(missing)}: this is no BLIP3o-NEXT style model folder"
            )
        vocabulary = cls(**{f.name: int(config[f.name]) for f in fields(cls)})
        span = vocabulary.image_end_token_id - vocabulary.image_start_token_id + 1
        if span != vocabulary.num_image_tokens:
            raise ImageRLError(
                f"config.json: {span} image token ids but num_image_tokens={vocabulary.num_image_tokens}"
            )
        return vocabulary

    def to_config(self) -> dict[str, int]:
        return asdict(self)

    @property
    def columns(self) -> slice:
        return slice(self.image_start_token_id, self.image_end_token_id + 1)


def positions_of(mask: Tensor) -> Tensor:
    """Return position ids [B, L] of left-padded sequences: the first real token stands at 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def score_tokens(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> TokenScores:
    """Return log-probs and entropies of `tokens` [B, T] given hidden states [B, T, D] and the head's image
    columns [V, D]. The softmax is in float32: in bfloat16 its log-probs carry errors of 1e-2. Peak memory is
    one chunk of logits, whatever B, T and V; chunks are recomputed in the backward pass."""

    def score(chunk_hidden: Tensor, chunk_tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(chunk_hidden, head).float() / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, chunk_tokens[:, None])[:, 0], entropy

    flat_hidden, flat_tokens = hidden.flatten(0, 1), tokens.flatten()
    rows = max(1, MAX_LOGITS_PER_CHUNK // head.shape[0])
    chunks = list(zip(flat_hidden.split(rows), flat_tokens.split(rows), strict=True))
    if len(chunks) == 1:
        logprobs, entropy = score(*chunks[0])
    else:
        scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return TokenScores(logprobs.view_as(tokens), entropy.view_as(tokens))


class ARPolicy(nn.Module):
    """The module that reinforcement learning trains: everything that has a gradient and nothing else."""

    def __init__(self, lm: Qwen3ForCausalLM, vocabulary: ImageVocabulary) -> None:
        super().__init__()
        self.lm = lm
        self.vocabulary = vocabulary
        self._adapter: tuple[PeftModel, ...] = ()  # in a tuple, so that it is not registered a second time
        self._new_adapter = False

    @property
    def head(self) -> Tensor:
        """The image columns [V, D] of the language model's head."""
        return self.lm.lm_head.weight[self.vocabulary.columns]

    def hidden_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, T + 1, D] of `<S0>` (the prompt's last id) and of T image tokens.

        `prompt_ids`, `prompt_mask` [P, L] left-padded; `tokens` [B, T] 0-based image tokens, B = P·G in
        group-major order. With G > 1 a prompt is read once for its whole group, gradients included."""
        if len(prompt_ids) < len(tokens):
            image_ids = tokens + self.vocabulary.image_start_token_id
            return self._hidden_states_of_groups(prompt_ids, prompt_mask.bool(), image_ids)
        return self.sequence_states(prompt_ids, prompt_mask, tokens)[:, prompt_ids.shape[1] - 1 :]

    def sequence_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, L + T, D] of sequences: prompts [B, L], then image tokens [B, T]."""
        ids = torch.cat([prompt_ids, tokens + self.vocabulary.image_start_token_id], dim=1)
        mask = torch.cat([prompt_mask.bool(), torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        out = self.lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        )
        return out.last_hidden_state

    def _hidden_states_of_groups(self, prompt_ids: Tensor, prompt_mask: Tensor, image_ids: Tensor) -> Tensor:
        group, rest = divmod(len(image_ids), len(prompt_ids))
        if rest:
            raise ValueError(f"{len(image_ids)} samples are not groups of {len(prompt_ids)} prompts")
        prompt = self.lm.model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=positions_of(prompt_mask),
            use_cache=True,
        )
        prompt.past_key_values.batch_repeat_interleave(group)  # differentiable: gradients of a group add up
        image_mask = torch.ones_like(image_ids, dtype=torch.bool)
        mask = torch.cat([prompt_mask.repeat_interleave(group, 0), image_mask], dim=1)
        image = self.lm.model(
            input_ids=image_ids,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, prompt_ids.shape[1] :],
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        first = prompt.last_hidden_state[:, -1:].repeat_interleave(group, 0)
        return torch.cat([first, image.last_hidden_state], dim=1)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, temperature: float
    ) -> TokenScores:
        """Score `tokens` [B, T] after the prompt. The last token is predicted, never fed."""
        hidden = self.hidden_states(prompt_ids, prompt_mask, tokens[:, :-1])
        return score_tokens(hidden, self.head, tokens, temperature)

    def freeze(self, patterns: Sequence[str]) -> None:
        """Leave the parameters whose names match a pattern such as "*embed_tokens*" as they are.

        Raises ImageRLError when a pattern matches no parameter: it would silently train what was to be kept."""
        names = dict(self.named_parameters())
        for pattern in patterns:
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise ImageRLError(
                    f"model.freeze: no parameter is named like {pattern!r}; they are called, for example, "
                    f"{', '.join(list(names)[:3])}"
                )
            for name in matching:
                names[name].requires_grad_(False)

    def add_lora(self, rank: int, alpha: float, dropout: float, target_modules: list[str] | str) -> None:
        """Freeze the weights and train low-rank adapters instead (arXiv 2106.09685), by PEFT."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            self.attach_adapter(get_peft_model(self.lm, config))
        except ValueError as error:
            raise ImageRLError(f"model.lora: {one_line(error, 300)}") from error
        self._new_adapter = True

    def attach_adapter(self, adapter: PeftModel) -> None:
        """Remember a PEFT model that was built around `lm`, whose layers it has replaced in place.

        Raises ImageRLError when it adapts what is used by its plain weight, so that the adapter would be ignored."""
        for name in ("lm_head", "model.embed_tokens"):
            if hasattr(self.lm.get_submodule(name), "base_layer"):
                raise ImageRLError(
                    f"model.lora.target_modules: {name} cannot have an adapter; name other layers"
                )
        self._adapter = (adapter,)

    def merge_adapter(self) -> None:
        """Fold the adapter into the weights for good, which may then train again. Nothing to do without."""
        if self.adapter is not None:
            self.adapter.merge_and_unload()
            self._adapter = ()
            self.lm.requires_grad_(True)

    def keep_reference(self) -> None:
        """Remember the present adapter as a second one, which never trains, for `reference_weights`. A new adapter
        changes nothing yet: there it is enough to turn it off."""
        if self.adapter is None or self._new_adapter:
            return
        own = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        settings = self.adapter.peft_config[ADAPTER]
        if REFERENCE not in self.adapter.peft_config:
            self.adapter.add_adapter(REFERENCE, replace(settings, inference_mode=True))
        parameters = dict(self.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(own.get(name, False))
            if f".{REFERENCE}." in name:
                parameter.data.copy_(parameters[name.replace(f".{REFERENCE}.", f".{ADAPTER}.")].data)

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Make the adapter what it was before training, in a context: the one that was kept, or none."""
        assert self.adapter is not None
        if REFERENCE not in self.adapter.peft_config:
            with self.base_weights():
                yield
            return
        own = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.adapter.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self.adapter.set_adapter(ADAPTER)
            for parameter, trains in own:  # PEFT has decided that anew
                parameter.requires_grad_(trains)

    @property
    def adapter(self) -> PeftModel | None:
        """The PEFT model around `lm` when LoRA is on."""
        return self._adapter[0] if self._adapter else None

    def base_weights(self) -> AbstractContextManager[Any]:
        """Turn adapters off in a context."""
        return self.adapter.disable_adapter() if self.adapter is not None else nullcontext()
