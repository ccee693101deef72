"""Random numbers as pure functions of what they are for, so that any of them can be drawn again alone."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """Derive a 63-bit seed from a key such as (run seed, "tokens", step, prompt, sample). Different keys give
    independent streams; the same key gives the same stream on every machine and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator for `key`. Always on the CPU, so that draws do not depend on the accelerator."""
    return torch.Generator().manual_seed(derive_seed(*key))
