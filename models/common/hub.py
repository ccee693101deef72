"""Fetch model folders from the Hugging Face hub: weights, settings and tokenizers, never code and never pickles."""

from __future__ import annotations

import re
from pathlib import Path

from imagerl.rl.errors import why
from imagerl.rl.types import ImageRLError

# Everything a model folder and the folders of its parts are read from. Code (*.py) and pickles (*.bin, *.pt, *.pth) are
# not even downloaded.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*merges.txt")
SHIPPED = ("tiny", "tiny_edit", "tiny_shapes")  # folders beside this one
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_name(path: str) -> bool:
    """Tell whether this could be `owner/name` or `owner/name@revision`. A path such as runs/x could be, too."""
    return re.fullmatch(_NAME, path) is not None


def snapshot(name: str) -> Path:
    """Return the folder of a model of the hub, downloaded at first use, then from the cache.

    Raises ImageRLError when the hub cannot be reached, or has no such model."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=list(WANTED))
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        raise ImageRLError(
            f"model {name!r} is no folder here, and fetching it from the Hugging Face hub failed "
            f"({why(error)}); check the name, or copy the model folder here and give its path"
        ) from error
    return Path(folder)
