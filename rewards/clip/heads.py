"""Turn a picture's and a caption's features into one number. Pure functions and a small network.

Features are [B, D] float32 of length 1; all heads return [B]."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from imagerl.rl.types import ImageRLError

SIMILARITIES = ("cosine", "clipscore", "logit", "probability")
STILL = 0.02  # distance of features of length 1 under which a picture has hardly changed
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
}


def cosine(pictures: Tensor, captions: Tensor) -> Tensor:
    """Raise ImageRLError when the features are not of one size."""
    if pictures.shape[-1] != captions.shape[-1]:
        raise ImageRLError(
            f"reward 'clip': the model makes {pictures.shape[-1]} numbers of a picture and {captions.shape[-1]} of a "
            "caption, which cannot be compared; take a model whose halves were trained together"
        )
    return (pictures * captions).sum(dim=-1)


def similarity(name: str, value: Tensor, scale: float, bias: float) -> Tensor:
    """Return one of SIMILARITIES from a cosine [B]:

    `cosine` in [-1, 1], as HPSv2 (arXiv 2306.09341) ranks; `clipscore` = 2.5·max(cosine, 0) (arXiv 2104.08718); `logit`
    = scale·cosine + bias, as PickScore (arXiv 2305.01569); `probability` = sigmoid(logit), as SigLIP was trained (arXiv
    2303.15343). `scale` and `bias` are the model's own."""
    if name == "cosine":
        return value
    if name == "clipscore":
        return 2.5 * value.clamp(min=0)
    logit = scale * value + bias
    return torch.sigmoid(logit) if name == "probability" else logit


def direction(pictures: Tensor, references: Tensor, captions: Tensor, before: Tensor) -> Tensor:
    """Return the cosine of what changed in pictures and words (arXiv 2108.00946); next to 0 where next to nothing
    did.

    A picture that is only encoded in another batch moves by rounding, and that has a direction, too: hence STILL."""
    moved, asked = pictures - references, captions - before
    return (moved * asked).sum(dim=-1) / (
        moved.norm(dim=-1).clamp(min=STILL) * asked.norm(dim=-1).clamp(min=1e-6)
    )


class PictureHead:
    """A network of linear layers from picture features [B, width] to [B], such as the LAION aesthetic predictor.

    `state` holds its weights, as in `linear_layers`; `activation` stands between them, and `place` names them in
    messages. Raises ImageRLError: no layers, or layers that do not fit."""

    def __init__(self, state: Mapping[str, Tensor], place: str, activation: str = "none") -> None:
        if activation not in ACTIVATIONS:
            raise ImageRLError(f"reward 'clip': activation must be one of {', '.join(ACTIVATIONS)}")
        self._between = ACTIVATIONS[activation]
        self._path = place
        self._layers = linear_layers(state)
        if not self._layers:
            raise ImageRLError(
                f"reward 'clip': head {place} holds no linear layer (<name>.weight, 2 dimensions)"
            )
        sizes = [(weight.shape[1], weight.shape[0]) for weight, _ in self._layers]
        if any(made != taken for (_, made), (taken, _) in pairwise(sizes)) or sizes[-1][1] != 1:
            shown = ", ".join(f"{taken} to {made}" for taken, made in sizes)
            raise ImageRLError(f"reward 'clip': the layers of head {place} do not lead to 1 number: {shown}")
        self.width = sizes[0][0]

    def check_width(self, width: int) -> None:
        """Raise ImageRLError when a model's features are not what the head was trained on."""
        if width != self.width:
            raise ImageRLError(
                f"reward 'clip': head {self._path} takes {self.width} numbers of a picture, the model makes {width}; "
                "name the model it was trained on"
            )

    def __call__(self, pictures: Tensor) -> Tensor:
        values = pictures
        for index, (weight, bias) in enumerate(self._layers):
            values = nn.functional.linear(self._between(values) if index else values, weight, bias)
        return values[:, 0]


def linear_layers(state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight [out, in] and bias of each linear layer in float32, `<name>.weight` and `<name>.bias`, in the order
    of the numbers in their names."""
    names = [name.removesuffix(".weight") for name, value in state.items() if _is_matrix(name, value)]
    biases = {name: state.get(f"{name}.bias") for name in names}
    return [
        (state[f"{name}.weight"].float(), None if (bias := biases[name]) is None else bias.float())
        for name in sorted(names, key=_natural)
    ]


def _is_matrix(name: str, value: Tensor) -> bool:
    return name.endswith(".weight") and value.ndim == 2


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layers.10 behind layers.2."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
