"""Frozen weights that wait in host memory while others train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostMemory:
    """Room in host memory for weights that are not used for a while; it is kept from one time to the next."""

    def __init__(self) -> None:
        self._room: dict[int, Tensor] = {}

    @contextmanager
    def holding(self, modules: Iterable[nn.Module], but: nn.Module) -> Iterator[None]:
        """Keep the parameters of `modules` here, so that their device has their memory; those of `but` stay.

        Inside they are empty, so that whatever uses one nevertheless fails."""
        used = {id(parameter) for parameter in but.parameters()}
        every = {id(parameter): parameter for module in modules for parameter in module.parameters()}
        waiting = {key: parameter for key, parameter in every.items() if key not in used}
        devices = {key: parameter.device for key, parameter in waiting.items()}
        for key, parameter in waiting.items():
            if key not in self._room:
                pin = parameter.device.type == "cuda"  # from pinned memory a GPU copies by itself
                self._room[key] = torch.empty_like(parameter, device="cpu", pin_memory=pin)
            self._room[key].copy_(parameter.data)
            parameter.data = parameter.data.new_empty(0)
        try:
            yield
        finally:
            for key, parameter in waiting.items():
                parameter.data = self._room[key].to(devices[key], non_blocking=True, copy=True)
