"""Turn pictures into discrete tokens: the interface of all tokenizers, and a small one that also draws its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from imagerl.rl.types import ImageRLError


class ImageTokenizer(nn.Module):
    """Reads pictures twice: as discrete tokens, which the language model writes and reads, and as the continuous
    features that these were rounded from."""

    key_prefix: str  # where its weights live in a model folder
    picture_size: tuple[int, int]  # H, W in pixels
    grid: tuple[int, int]  # rows and columns of tokens
    num_codes: int
    scales: tuple[int, ...] = (1,)  # how many patches of a side one token may stand for

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def grid_at(self, scale: int) -> tuple[int, int]:
        """Return rows and columns of tokens at a scale. Raises ImageRLError for a scale that the tokenizer has not."""
        if scale not in self.scales:
            raise ImageRLError(
                f"this model's pictures have no scale {scale}, only {', '.join(map(str, self.scales))}"
            )
        return self.grid[0] // scale, self.grid[1] // scale

    def encode(self, pictures: Tensor, scale: int = 1) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] as tokens [B, T] int64, row by row."""
        raise NotImplementedError

    def features(self, pictures: Tensor) -> Tensor:
        """Map pictures [B, 3, H, W] in [-1, 1] to features [B, T, C]."""
        raise NotImplementedError

    def require_size(self, pictures: Tensor) -> None:
        """Raise ImageRLError when pictures [B, 3, H, W] have another size than the tokenizer reads."""
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, *self.picture_size):
            height, width = self.picture_size
            raise ImageRLError(
                f"the image tokenizer reads RGB pictures of {width}x{height} pixels, not tensors of shape "
                f"{tuple(pictures.shape)}; use prepare_picture"
            )


@dataclass(frozen=True, slots=True)
class FSQTokenizerConfig:
    image_size: tuple[int, int]  # H, W in pixels
    patch: tuple[int, int]  # pixels per token, H, W
    width: int  # channels of the convolutions
    depth: int  # residual blocks on either side
    levels: tuple[int, ...]  # values per code dimension; the codebook has their product

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Sequence[int] | int]) -> FSQTokenizerConfig:
        """Read a dict, turning JSON's lists into tuples."""
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()})  # type: ignore[arg-type]


class FiniteScalarQuantizer(nn.Module):
    """Rounds each of len(levels) bounded numbers to one of `levels[i]` values (arXiv 2309.15505).

    The gradient passes straight through the rounding. A code's index is its mixed-radix number."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        sizes = torch.tensor(levels)
        self.levels = nn.Buffer(sizes, persistent=False)
        self.radix = nn.Buffer(torch.cat([sizes.new_ones(1), sizes.cumprod(0)[:-1]]), persistent=False)
        self.num_codes = int(sizes.prod())

    def digits(self, z: Tensor) -> Tensor:
        """Map [..., len(levels)] of any real numbers to the integers 0..level-1, differentiable."""
        top = self.levels - 1
        position = torch.sigmoid(z) * top
        return position + (position.round() - position).detach()

    def index(self, digits: Tensor) -> Tensor:
        return (digits.round().long() * self.radix).sum(-1)

    def values(self, digits: Tensor) -> Tensor:
        """Map digits to the numbers in [-1, 1] that the decoder sees."""
        return digits * 2 / (self.levels - 1) - 1

    def digits_of(self, index: Tensor) -> Tensor:
        return (index[..., None] // self.radix) % self.levels


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FSQTokenizer(ImageTokenizer):
    """A convolutional autoencoder on a grid of patches with an FSQ bottleneck: one token per patch."""

    key_prefix = "image_tokenizer."

    def __init__(self, config: FSQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.grid, self.picture_size = config.grid, config.image_size
        height, width = config.patch
        pixels = 3 * height * width
        codes = len(config.levels)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self.num_codes = self.quantizer.num_codes
        self.encoder = nn.Sequential(
            nn.Conv2d(3, config.width, config.patch, stride=config.patch),
            *(ResidualBlock(config.width) for _ in range(config.depth)),
            nn.Conv2d(config.width, codes, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(codes, config.width, 3, padding=1),
            *(ResidualBlock(config.width) for _ in range(config.depth)),
            nn.Conv2d(config.width, pixels, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstruction [B, 3, H, W] of images in [-1, 1], differentiable through the codes."""
        digits = self.quantizer.digits(self.encoder(images).permute(0, 2, 3, 1))
        return self._draw(digits)

    @torch.no_grad()
    def encode(self, pictures: Tensor, scale: int = 1) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, T] int64, row by row."""
        self.require_size(pictures)
        self.grid_at(scale)
        digits = self.quantizer.digits(self.encoder(pictures).permute(0, 2, 3, 1))
        return self.quantizer.index(digits).flatten(1)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, T, width]: what the last projection reads."""
        self.require_size(pictures)
        return self.encoder[:-1](pictures).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decode [B, T] to [B, 3, H, W], about [-1, 1]."""
        rows, columns = self.grid
        return self._draw(self.quantizer.digits_of(tokens.reshape(-1, rows, columns)))

    def _draw(self, digits: Tensor) -> Tensor:
        patches = self.decoder(self.quantizer.values(digits).permute(0, 3, 1, 2))  # [B, 3·h·w, rows, columns]
        batch, _, rows, columns = patches.shape
        height, width = self.config.patch
        grid = patches.reshape(batch, 3, height, width, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return grid.reshape(batch, 3, rows * height, columns * width)
