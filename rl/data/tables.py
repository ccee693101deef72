"""Rows of prompts from what the library `datasets` reads: Parquet, folders that it saved, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from imagerl.rl.errors import ImageRLError, one_line

HUB = "hf:"  # before the name of a data set of the hub, as in hf:owner/name


def is_table(source: str) -> bool:
    """Tell whether a prompt set's path is for `datasets` to read."""
    return source.startswith(HUB) or Path(source).suffix.lower() == ".parquet" or Path(source).is_dir()


def read_table(
    source: str, split: str | None, subset: str | None, size: int | None
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the first `size` rows, all when None, with their numbers from 1, as they come: of the hub and of Parquet no
    more is read than that. Pictures stay the bytes of their files.

    Raises ImageRLError, with the row, for what cannot be read."""
    row = 0
    try:
        for row, values in enumerate(islice(_opened(source, split, subset), size), 1):
            yield row, {name: _picture_bytes(value) for name, value in values.items()}
    except ImageRLError:
        raise
    except Exception as error:  # of a library that is not ours, on unchecked bytes
        place = f"{source}, row {row + 1}" if row else source
        raise ImageRLError(f"{place}: cannot be read as a data set ({one_line(error, 200)})") from error


def _opened(source: str, split: str | None, subset: str | None) -> Any:
    """Open a data set whose pictures are not decoded."""
    from datasets import DatasetDict, Image, load_dataset, load_from_disk

    if source.startswith(HUB):
        opened = load_dataset(source.removeprefix(HUB), subset, split=_named(source, split), streaming=True)
    elif Path(source).is_dir():
        opened = load_from_disk(source)
        if isinstance(opened, DatasetDict):
            if split not in opened:
                raise ImageRLError(f"{source} has the splits {', '.join(opened)}; name one of them as split")
            opened = opened[split]
    else:
        if not Path(source).is_file():
            raise ImageRLError(f"there is no file {source}; correct the prompt set's path")
        opened = load_dataset("parquet", data_files=source, split="train", streaming=True)
    for name, feature in (opened.features or {}).items():
        if isinstance(feature, Image):
            opened = opened.cast_column(name, Image(decode=False))
    return opened


def _named(source: str, split: str | None) -> str:
    if split is None:
        raise ImageRLError(f"{source} may have several splits; name one, as in split: train")
    return split


def _picture_bytes(value: object) -> object:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value
