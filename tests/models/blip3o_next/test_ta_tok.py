from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.blip3o_next import ta_tok
from imagerl.models.blip3o_next.ta_tok import SimVQ, TATokenizer, load_ta_tok
from imagerl.rl.types import ImageRLError
from tests.models.helpers import stir

HEADS, SIZE = 2, 64
CONFIG: dict[str, Any] = {
    "siglip": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": 9,
    },
    "bottleneck": {
        "bottleneck_dim": 6,
        "regularizer": {"name": "simvq", "args": {"codebook_size": 50, "l2_normalized": True}},
    },
    "decoder_depth": 1,
}


@pytest.fixture(scope="module")
def tokenizer() -> TATokenizer:
    torch.manual_seed(0)
    tokenizer = TATokenizer(CONFIG)
    stir(tokenizer)
    return tokenizer.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_are_the_last_but_one_hidden_state_through_the_task_layer(
    tokenizer: TATokenizer, pictures: Tensor
) -> None:
    hidden = tokenizer.encoder(pictures, output_hidden_states=True).hidden_states
    wanted = tokenizer.encode_task_layer(hidden[-2])
    features = tokenizer.features(pictures)
    assert torch.equal(features, wanted) and features.shape == (2, 49, 24)
    assert (tokenizer.encode_task_layer(hidden[-1]) - features).abs().max() > 0.1


def test_tokens_are_the_codes_of_the_largest_cosine(tokenizer: TATokenizer, pictures: Tensor) -> None:
    z = tokenizer.bottleneck.in_linear(tokenizer.features(pictures))
    codes = tokenizer.bottleneck.regularizer.embedding_proj(tokenizer.bottleneck.regularizer.embedding.weight)
    cosine = F.cosine_similarity(z[:, :, None], codes, dim=-1)
    tokens = tokenizer.encode(pictures)
    assert torch.equal(tokens, cosine.argmax(-1)) and tokens.dtype == torch.int64
    assert tokens.unique().numel() >= 4 and tokenizer.num_tokens == tokens.shape[1] == 49


def test_codes_of_any_length_are_compared_by_distance() -> None:
    vq = SimVQ(3, 2, l2_normalized=False)
    with torch.no_grad():
        vq.embedding_proj.weight.copy_(torch.eye(2))
        vq.embedding_proj.bias.zero_()
        vq.embedding.weight.copy_(torch.tensor([[9.0, 9.0], [1.0, 0.9], [-1.0, 0.0]]))
    z = torch.tensor([[[1.0, 1.0], [8.0, 8.0], [-2.0, 0.1]]])
    assert vq.nearest(z).tolist() == [[1, 0, 2]]


def test_a_large_codebook_is_searched_in_chunks(
    tokenizer: TATokenizer, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokenizer.encode(pictures)
    monkeypatch.setattr(ta_tok, "MAX_SCORES_PER_CHUNK", 50 * 7)
    assert torch.equal(tokenizer.encode(pictures), wanted)


@pytest.mark.parametrize(("scale", "side"), [(1, 7), (2, 3), (3, 2)])
def test_scales_average_windows_of_patches(
    tokenizer: TATokenizer, pictures: Tensor, scale: int, side: int
) -> None:
    """Windows that do not fit are left out: 7 = 3·2 + 1 = 2·3 + 1, as 27 = 13·2 + 1."""
    hidden = tokenizer.encoder(pictures, output_hidden_states=True).hidden_states[-2]
    grid = hidden.view(2, 7, 7, 24)[:, : side * scale, : side * scale]
    pooled = grid.reshape(2, side, scale, side, scale, 24).mean(dim=(2, 4)).flatten(1, 2)
    features = tokenizer.features(pictures, scale)
    torch.testing.assert_close(features, tokenizer.encode_task_layer(pooled), rtol=1e-5, atol=1e-6)
    assert tokenizer.grid_at(scale) == (side, side)
    assert tokenizer.encode(pictures, scale).shape == (2, side * side)


def test_codes_are_turned_back_into_features(tokenizer: TATokenizer, pictures: Tensor) -> None:
    tokens = tokenizer.encode(pictures, 2)
    features = tokenizer.features_of(tokens)
    assert features.shape == (2, 9, 24)
    alone = tokenizer.features_of(tokens[1:])
    torch.testing.assert_close(features[1:], alone, rtol=1e-5, atol=1e-5)
    changed = tokenizer.features_of((tokens + 1) % 50)
    assert (changed - features).abs().max() > 0.01


def test_other_sizes_scales_and_quantisers_are_refused(tokenizer: TATokenizer, pictures: Tensor) -> None:
    with pytest.raises(ImageRLError, match="64x64 pixels"):
        tokenizer.encode(pictures[:, :, :32])
    with pytest.raises(ImageRLError, match="64x64 pixels"):
        tokenizer.features(pictures[:, :1])
    with pytest.raises(ImageRLError, match="no scale 4, only 1, 2, 3"):
        tokenizer.encode(pictures, 4)
    regularizer = {"name": "vq", "args": {"codebook_size": 4}}
    with pytest.raises(ImageRLError, match="'vq' is unknown"):
        TATokenizer({**CONFIG, "bottleneck": {"bottleneck_dim": 4, "regularizer": regularizer}})


def published_pth(tokenizer: TATokenizer, file: Path) -> Path:
    """The layout of the published ta_tok.pth: arguments beside a state that holds a teacher and [0, 1] pictures."""
    state = {
        **tokenizer.state_dict(),
        "scale_layer.shift": torch.full((1, 3, 1, 1), 0.5),
        "scale_layer.scale": torch.full((1, 3, 1, 1), 0.5),
        "teacher.head.weight": torch.zeros(2),
    }
    torch.save({"model": {"name": "ta_tok", "args": {"input_size": SIZE}, "sd": state}}, file)
    return file


def test_a_published_file_is_loaded(tokenizer: TATokenizer, pictures: Tensor, tmp_path: Path) -> None:
    loaded = load_ta_tok(published_pth(tokenizer, tmp_path / "ta_tok.pth"), HEADS, SIZE)
    assert torch.equal(loaded.encode(pictures), tokenizer.encode(pictures))
    assert torch.equal(loaded.features(pictures), tokenizer.features(pictures))


@pytest.mark.parametrize("prefix", ["", TATokenizer.key_prefix])
def test_safetensors_are_loaded(
    tokenizer: TATokenizer, pictures: Tensor, tmp_path: Path, prefix: str
) -> None:
    file = tmp_path / "tok.safetensors"
    others = {"lm_head.weight": torch.zeros(2, 2)} if prefix else {}
    save_file({prefix + name: t for name, t in tokenizer.state_dict().items()} | others, file)
    loaded = load_ta_tok(file, HEADS, SIZE)
    assert torch.equal(loaded.encode(pictures), tokenizer.encode(pictures))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/evil_was_here").touch, ())


def test_damaged_and_dangerous_files_are_refused_in_one_line(tokenizer: TATokenizer, tmp_path: Path) -> None:
    whole = published_pth(tokenizer, tmp_path / "ta_tok.pth").read_bytes()
    cut, evil, empty = (tmp_path / name for name in ("cut.pth", "evil.pth", "empty.safetensors"))
    cut.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    torch.save({"model": {"sd": {}, "args": Evil()}}, evil)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"weight": torch.zeros(2)}, wrong)
    for file in (cut, evil, empty, wrong, tmp_path / "absent.pth"):
        with pytest.raises(ImageRLError, match=file.name) as told:
            load_ta_tok(file, HEADS, SIZE)
        assert "\n" not in str(told.value)
    with pytest.raises(ImageRLError, match="no TA-Tok checkpoint"):
        load_ta_tok(tmp_path / "ta_tok.pth", HEADS, SIZE * 2)
