"""Sizes of pictures, and the grids of image tokens and latents that stand for them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from imagerl.rl.errors import ImageRLError

TOKEN_PIXELS = 32  # pixels of a side that an image token stands for
PREVIEW_SIDE = 16  # tokens of a side of a square preview
LONGEST = 2048  # pixels of a side that the decoder was made for
Grid = tuple[int, int]  # rows, columns of tokens


class Size(NamedTuple):
    """A picture's size in pixels: Size(1024, 768) has 32 rows of 24 tokens, after a preview of 18 by 13."""

    height: int
    width: int

    @property
    def large(self) -> Grid:
        """The grid that the decoder draws by."""
        return self.height // TOKEN_PIXELS, self.width // TOKEN_PIXELS

    @property
    def preview(self) -> Grid:
        """The grid of about 256 tokens that is written first, of the same aspect."""
        rows, columns = self.large
        ratio = rows / columns
        return int(math.sqrt(ratio) * PREVIEW_SIDE), int(math.sqrt(1 / ratio) * PREVIEW_SIDE)

    @property
    def tokens(self) -> int:
        """Count the tokens that are written of it, preview included."""
        return math.prod(self.large) + math.prod(self.preview)


def size_of(columns: Mapping[str, object], default: Size) -> Size:
    """Return the size that a prompt asks for in its columns `height` and `width`, the default where it has none.

    Raises ImageRLError for a size that no grid of tokens holds."""
    given = [columns.get(name) for name in ("height", "width")]
    if given == [None, None]:
        return default
    try:
        size = Size(*(int(str(value)) for value in given))
    except ValueError:
        raise ImageRLError(f"height and width are {given}; give both, as pixels, or neither") from None
    return require_size(size)


def require_size(size: Size) -> Size:
    """Return the size. Raises ImageRLError like `size_of`."""
    for name, side in zip(size._fields, size, strict=True):
        if side < TOKEN_PIXELS or side % TOKEN_PIXELS:
            nearest = max(1, round(side / TOKEN_PIXELS)) * TOKEN_PIXELS
            raise ImageRLError(
                f"{name} is {side}: an image token stands for {TOKEN_PIXELS} pixels, so sides are multiples of "
                f"{TOKEN_PIXELS}; the nearest is {nearest}"
            )
        if side > LONGEST:
            raise ImageRLError(f"{name} is {side}, but the model draws at most {LONGEST} pixels a side")
    return size


def upsampled(tokens: Tensor, grid: Grid) -> Tensor:
    """Repeat each of the last rows·columns tokens [B, T] for the 2×2 patches of the decoder that it stands for."""
    rows, columns = grid
    large = tokens[:, -rows * columns :].view(-1, rows, columns)
    return large.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def flow_shift(tokens: int, base: float, largest: float, base_tokens: int) -> float:
    """Return mu, by which larger pictures of `tokens` patches spend more steps at high noise."""
    return (tokens / base_tokens) ** 0.5 * largest + base
