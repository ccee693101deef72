"""Where the fixtures are that hold what public implementations return: tests/data/parity, or IMAGERL_PARITY_DIR."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("IMAGERL_PARITY_DIR") or Path(__file__).parent / "data" / "parity")


def algorithms() -> dict[str, Tensor]:
    """Advantages of verl, steps of flow_grpo, flow losses of verl-omni, on seeded tensors, by name."""
    return load_file(FOLDER / "algorithms.safetensors")
