"""Remember features, so that none is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
REMEMBERED = 100_000  # captions or references; 400 MB of the features of a large model


class Remembered(Generic[T]):
    """Features by key: each is computed once, in one call for all that are new; the oldest are forgotten."""

    def __init__(self, encode: Callable[[Sequence[T]], Tensor], limit: int = REMEMBERED) -> None:
        self._encode = encode
        self._limit = limit
        self._known: dict[Hashable, Tensor] = {}

    def __call__(self, keys: Sequence[Hashable], values: Sequence[T]) -> Tensor:
        """Return [B, D] of B values, told apart by their keys."""
        new = {key: value for key, value in zip(keys, values, strict=True) if key not in self._known}
        if new:
            # Copies: a row of the whole would keep the whole in memory.
            self._known |= zip(new, (row.clone() for row in self._encode(list(new.values()))), strict=True)
        features = torch.stack([self._known[key] for key in keys])
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]
        return features
