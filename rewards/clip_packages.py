"""open_clip, wherever it is installed, and the torchvision that it needs beside any build of torch.

This is the only place that knows of either. PyPI's torchvision on Linux is built for torch with CUDA. Beside torch's
CPU build its compiled operators do not load, importing it fails, and so does what imports it where it is installed:
transformers, trl, peft, diffusers. So `make` puts these packages into a folder of their own, which only a process
that asks for open_clip ever sees."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from rl.types import ImageRLError

FOLDER = "clip"  # below the environment's own folder: `make` installs requirements-clip.lock there
OPERATORS = ("nms", "qnms")  # of torchvision: its Python code registers something for each, compiled or not
_LIBRARIES: list[Any] = []  # a definition lives as long as the object that made it


def import_open_clip() -> Any:
    """The module. Raises ImageRLError when it is not installed or cannot be imported."""
    folder = Path(sys.prefix) / FOLDER
    if importlib.util.find_spec("open_clip") is None and folder.is_dir():
        sys.path.append(str(folder))  # last, to shadow nothing
    if importlib.util.find_spec("open_clip") is None:
        raise ImageRLError("open_clip is not installed; install it with: pip install 'imagerl[clip]'")
    try:
        _import_torchvision()
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ImageRLError(
            f"open_clip is installed but cannot be imported ({type(error).__name__}: {reason}); install torch and "
            "torchvision of one build, from the same index"
        ) from error


def _import_torchvision() -> None:
    """Where its compiled code does not fit, declares the operators that its Python code takes for granted. open_clip
    calls none of them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")
