"""A half of a generator whose language model may have LoRA adapters (arXiv 2106.09685), by PEFT."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER, REFERENCE = "default", "reference"  # names within PEFT: the adapter, and what it was before training


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters whose names match a pattern such as "*embed_tokens*" as they are.

    Raises ImageRLError when a pattern matches no parameter: it would silently train what was to be kept."""
    names = dict(module.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ImageRLError(
                f"model.freeze: no parameter is named like {pattern!r}; they are called, for example, "
                f"{', '.join(list(names)[:3])}"
            )
        for name in matching:
            names[name].requires_grad_(False)


class Adaptable(nn.Module):
    """A module around a transformers model, `lm`, whose layers PEFT replaces in place."""

    not_adaptable: Sequence[str] = ()  # layers of `lm` that are used by their plain weight

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self._adapter: tuple[PeftModel, ...] = ()  # in a tuple, so that it is not registered a second time
        self._new_adapter = False

    @property
    def adapter(self) -> PeftModel | None:
        """The PEFT model around `lm` when LoRA is on."""
        return self._adapter[0] if self._adapter else None

    def add_lora(self, rank: int, alpha: float, dropout: float, target_modules: Sequence[str] | str) -> None:
        """Freeze the weights and train low-rank adapters instead."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            task_type=self.task_type,
        )
        try:
            self.attach_adapter(get_peft_model(self.lm, config))
        except ValueError as error:
            raise ImageRLError(f"model.lora: {one_line(error, 300)}") from error
        self._new_adapter = True

    @property
    def task_type(self) -> str | None:
        """What PEFT takes `lm` for: only a model that generates text by itself is one to it."""
        return "CAUSAL_LM" if hasattr(self.lm, "prepare_inputs_for_generation") else None

    def attach_adapter(self, adapter: PeftModel) -> None:
        """Remember a PEFT model that was built around `lm`, whose layers it has replaced in place.

        Raises ImageRLError when it adapts what is used by its plain weight, so that the adapter would be ignored."""
        for name in self.not_adaptable:
            if hasattr(self.lm.get_submodule(name), "base_layer"):
                raise ImageRLError(
                    f"model.lora.target_modules: {name} cannot have an adapter; name other layers"
                )
        self._adapter = (adapter,)
        for parameter_name, parameter in self.named_parameters():
            if ".lora_" not in parameter_name:  # PEFT knows `lm` only, not a head beside it
                parameter.requires_grad_(False)

    def merge_adapter(self) -> None:
        """Fold the adapter into the weights for good, which may then train again. Nothing to do without."""
        if self.adapter is not None:
            self.adapter.merge_and_unload()
            self._adapter = ()
            self.requires_grad_(True)

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

    def base_weights(self) -> AbstractContextManager[Any]:
        """Turn adapters off in a context."""
        return self.adapter.disable_adapter() if self.adapter is not None else nullcontext()
