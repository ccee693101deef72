"""Import open_clip, wherever it is installed, and the torchvision that it needs beside any build of torch.

This is the only place that knows of either. PyPI's torchvision on Linux is built for torch with CUDA. Beside torch's
CPU build its compiled operators do not load, importing it fails, and so does what imports it where it is installed:
transformers, trl, peft, diffusers. So `make` puts these packages into a folder of their own, which a process
sees only while it imports open_clip: whatever looks for torchvision later, there or in a child, must not find it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from imagerl.rl.errors import why
from imagerl.rl.types import ImageRLError

FOLDER = "clip"  # below the environment's own folder: `make` installs requirements-clip.lock there
OPERATORS = ("nms", "qnms")  # of torchvision: its Python code registers something for each, compiled or not
_LIBRARIES: list[object] = []  # a definition lives as long as the object that made it


def import_open_clip() -> ModuleType:
    """Return the module. Raises ImageRLError when it is not installed or cannot be imported."""
    with _folder_on_path():
        if importlib.util.find_spec("open_clip") is None:
            raise ImageRLError("open_clip is not installed; install it with: pip install 'imagerl[clip]'")
        try:
            _import_torchvision()
            return importlib.import_module("open_clip")
        except (ImportError, RuntimeError) as error:
            raise ImageRLError(
                f"open_clip is installed but cannot be imported ({why(error)}); install torch and "
                "torchvision of one build, from the same index"
            ) from error


@contextmanager
def _folder_on_path() -> Iterator[None]:
    """Add our folder to the path, unless open_clip is found without it."""
    folder = str(Path(sys.prefix) / FOLDER)
    if importlib.util.find_spec("open_clip") is not None or not Path(folder).is_dir():
        yield
        return
    sys.path.append(folder)  # last, to shadow nothing
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import_torchvision() -> None:
    """Import it; if its compiled code does not fit, declare the operators that its Python code needs. open_clip
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
