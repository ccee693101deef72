"""TA-Tok, the text-aligned tokenizer of BLIP3o-NEXT (arXiv 2506.18898): a SigLIP 2 tower (arXiv 2502.14786), a task
layer, and the nearest of a SimVQ codebook (arXiv 2411.02038). Module names are the published keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagerl.models.common.image_tokenizer import ImageTokenizer
from imagerl.rl.errors import one_line
from imagerl.rl.types import ImageRLError

PUBLISHED_HEADS, PUBLISHED_IMAGE_SIZE = 16, 384  # SigLIP2-so400m; weights alone do not tell these two
DECODER_DEPTH = 3
MAX_SCORES_PER_CHUNK = 1 << 25  # cosines alive at once: 128 MiB in float32


class SimVQ(nn.Module):
    """A frozen table of vectors seen through a learned linear map: the codes are the map's outputs."""

    def __init__(self, codebook_size: int, width: int, l2_normalized: bool) -> None:
        super().__init__()
        self.l2_normalized = l2_normalized
        self.embedding = nn.Embedding(codebook_size, width)
        self.embedding_proj = nn.Linear(width, width)

    def codes(self) -> Tensor:
        """Return the codes [codes, width], of length 1 when normalised."""
        codes = self.embedding_proj(self.embedding.weight)
        return F.normalize(codes, dim=-1) if self.l2_normalized else codes

    def nearest(self, z: Tensor) -> Tensor:
        """Map [..., width] to [...] int64: the code of the largest cosine, or of the smallest distance when codes are
        not normalised. In float32: bfloat16 cosines of neighbouring codes are often equal."""
        codes = self.codes().float()
        # argmin |z − c|² = argmax z·c − |c|²/2; the second term is constant for codes of length 1
        offset = 0.0 if self.l2_normalized else codes.square().sum(-1) / 2
        rows = max(1, MAX_SCORES_PER_CHUNK // len(codes))
        chunks = z.float().flatten(0, -2).split(rows)
        return torch.cat([(chunk @ codes.T - offset).argmax(-1) for chunk in chunks]).view(z.shape[:-1])


class Bottleneck(nn.Module):
    """Features to a few numbers, their code, and the code back to a few numbers."""

    def __init__(self, features: int, bottleneck_dim: int, regularizer: Mapping[str, Any]) -> None:
        super().__init__()
        if regularizer["name"] != "simvq":
            raise ImageRLError(
                f"ta_tok.bottleneck.regularizer {regularizer['name']!r} is unknown; only simvq is"
            )
        arguments = regularizer["args"]
        self.in_linear = nn.Linear(features, bottleneck_dim)
        self.out_linear = nn.Linear(bottleneck_dim, bottleneck_dim)
        self.regularizer = SimVQ(
            arguments["codebook_size"], bottleneck_dim, bool(arguments.get("l2_normalized", False))
        )


class Scaling(nn.Module):
    """(x − shift) / scale per channel. Checkpoints hold 0 and 1: pictures arrive in [-1, 1] already."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Buffer(torch.zeros(1, 3, 1, 1))
        self.scale = nn.Buffer(torch.ones(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures - self.shift) / self.scale


class TATokenizer(ImageTokenizer):
    """One encoder, two readings: discrete tokens to generate and continuous features to understand.

    `config` holds `siglip` (a SigLIP vision configuration), `bottleneck`, and may hold `decoder_depth`."""

    key_prefix = "model.vision_tower.vision_tower."
    scales = (1, 2, 3)  # announced to the language model by `<S0>`, `<S1>`, `<S2>`

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import (
            Siglip2VisionConfig,
            Siglip2VisionModel,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        siglip, bottleneck = SiglipVisionConfig(**config["siglip"]), config["bottleneck"]
        width, code_width = siglip.hidden_size, int(bottleneck["bottleneck_dim"])
        decoder = Siglip2VisionConfig(
            hidden_size=width,
            num_channels=code_width,
            patch_size=1,
            num_hidden_layers=int(config.get("decoder_depth", DECODER_DEPTH)),
        )
        self.encoder = SiglipVisionModel(siglip)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.bottleneck = Bottleneck(width, code_width, bottleneck["regularizer"])
        self.decoder = nn.ModuleDict({"vision_model": Siglip2VisionModel(decoder)})
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.scale_layer = Scaling()
        side = siglip.image_size // siglip.patch_size
        self.grid = (side, side)
        self.picture_size = (siglip.image_size, siglip.image_size)
        self.num_codes = int(bottleneck["regularizer"]["args"]["codebook_size"])

    @torch.no_grad()
    def features(self, pictures: Tensor, scale: int = 1) -> Tensor:
        """Map pictures [B, 3, H, W] in [-1, 1] to features [B, T, C] in [-1, 1], before they are quantised.

        Scale 2 and 3 average windows of 2×2 and 3×3 patches: 27×27 becomes 13×13 and 9×9."""
        self.require_size(pictures)
        rows, columns = self.grid
        self.grid_at(scale)
        x = self.encoder.embeddings(self.scale_layer(pictures))
        for layer in self.encoder.encoder.layers[:-1]:  # hidden state -2
            x = layer(x, None)
        if scale != 1:
            x = x.transpose(1, 2).reshape(len(x), -1, rows, columns)
            x = F.avg_pool2d(x, scale).flatten(2).transpose(1, 2)
        return self.encode_task_layer(x)

    @torch.no_grad()
    def encode(self, pictures: Tensor, scale: int = 1) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] as tokens [B, T] int64, row by row."""
        return self.bottleneck.regularizer.nearest(self.bottleneck.in_linear(self.features(pictures, scale)))

    @torch.no_grad()
    def features_of(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] of a square grid to features [B, T, C] rebuilt from the codes alone."""
        batch, count = tokens.shape
        side = math.isqrt(count)
        z = self.bottleneck.out_linear(F.embedding(tokens, self.bottleneck.regularizer.codes()))
        shapes = torch.tensor([[side, side]] * batch, device=tokens.device)
        out = self.decoder["vision_model"](z, torch.ones_like(tokens, dtype=torch.int32), shapes)
        return self.decode_task_layer(out.last_hidden_state)


def load_ta_tok(
    path: Path, heads: int = PUBLISHED_HEADS, image_size: int = PUBLISHED_IMAGE_SIZE
) -> TATokenizer:
    """Load a tokenizer from the published `ta_tok.pth` or a safetensors file, with bare keys or a checkpoint's.

    Sizes are read off the weights; `heads` and `image_size` (pixels) cannot be. Nothing but tensors and plain
    containers is unpickled. Raises ImageRLError when the file is damaged or no TA-Tok."""
    stored = _read_tensors(path)
    prefix = TATokenizer.key_prefix if any(name.startswith(TATokenizer.key_prefix) for name in stored) else ""
    state = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in stored.items()
        if name.startswith(prefix) and not name.startswith("teacher")
    }
    try:
        tokenizer = TATokenizer(_config_of(state, heads, image_size))
        state |= tokenizer.scale_layer.state_dict(prefix="scale_layer.")  # a .pth expects pictures in [0, 1]
        tokenizer.load_state_dict(state)
    except Exception as error:  # sizes read off tensors of any shape
        raise ImageRLError(f"{path} is no TA-Tok checkpoint: {one_line(error, 200)}") from error
    return tokenizer.requires_grad_(False).eval()


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise ImageRLError(f"there is no file {path}; give ta_tok.pth or a safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return stored["model"]["sd"]
    except Exception as e:  # safetensors, zip and pickle have many; the file is not ours
        told = one_line(e, 200)
        raise ImageRLError(f"{path} cannot be read as TA-Tok weights ({told}); copy it again") from e


def _config_of(state: Mapping[str, Tensor], heads: int, image_size: int) -> dict[str, object]:
    def depth(prefix: str) -> int:
        numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
        return len(numbers)

    patches = state["encoder.embeddings.patch_embedding.weight"]
    codebook = state["bottleneck.regularizer.embedding.weight"]
    return {
        "siglip": {
            "hidden_size": patches.shape[0],
            "intermediate_size": state["encoder.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": depth("encoder.encoder.layers."),
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patches.shape[-1],
        },
        "bottleneck": {
            "bottleneck_dim": codebook.shape[1],
            "regularizer": {
                "name": "simvq",
                "args": {"codebook_size": codebook.shape[0], "l2_normalized": True},
            },
        },
        "decoder_depth": depth("decoder.vision_model.encoder.layers."),
    }
