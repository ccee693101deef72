from __future__ import annotations

import itertools

import pytest
import torch

from imagerl.models.common.image_tokenizer import FiniteScalarQuantizer, FSQTokenizer, FSQTokenizerConfig
from imagerl.rl.types import ImageRLError


def tokenizer(levels: tuple[int, ...] = (4, 3), depth: int = 1) -> FSQTokenizer:
    torch.manual_seed(0)
    return FSQTokenizer(FSQTokenizerConfig((8, 16), (4, 4), 8, depth, levels)).eval()


def test_every_code_has_an_index_and_back() -> None:
    quantizer = FiniteScalarQuantizer([4, 3, 2])
    assert quantizer.num_codes == 24
    index = torch.arange(24)
    digits = quantizer.digits_of(index)
    assert torch.equal(quantizer.index(digits), index)
    assert {tuple(row) for row in digits.tolist()} == set(itertools.product(range(4), range(3), range(2)))


def test_an_index_is_a_mixed_radix_number() -> None:
    quantizer = FiniteScalarQuantizer([4, 3, 2])
    assert quantizer.index(torch.tensor([3, 2, 1])).item() == 3 + 4 * 2 + 4 * 3 * 1
    assert quantizer.digits_of(torch.tensor([[5]])).tolist() == [[[1, 1, 0]]]


def test_digits_are_rounded_and_bounded_whatever_comes_in() -> None:
    quantizer = FiniteScalarQuantizer([5, 2])
    z = torch.tensor([[-1e4, -1e4], [1e4, 1e4], [0.0, 0.1], [1.2, -0.1]])
    assert quantizer.digits(z).tolist() == [[0, 0], [4, 1], [2, 1], [3, 0]]
    assert torch.equal(quantizer.digits(z.bfloat16()).float(), quantizer.digits(z))
    assert quantizer.values(torch.tensor([[0, 0], [2, 1], [4, 0]])).tolist() == [[-1, -1], [0, 1], [1, -1]]


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    quantizer = FiniteScalarQuantizer([5, 3])
    z = torch.randn(6, 2, requires_grad=True)
    quantizer.digits(z).sum().backward()
    sigmoid = torch.sigmoid(z.detach())
    torch.testing.assert_close(z.grad, sigmoid * (1 - sigmoid) * torch.tensor([4, 2]))


def test_tokens_stand_row_by_row() -> None:
    """One patch differs; without residual blocks nothing else sees it. Grid 2 × 4."""
    model = tokenizer(depth=0)
    with torch.no_grad():
        model.encoder[0].weight.normal_()
        model.encoder[-1].weight.normal_()
    for row, column in itertools.product(range(2), range(4)):
        pictures = torch.full((2, 3, 8, 16), -1.0)
        pictures[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
        plain, marked = model.encode(pictures)
        assert (plain != marked).nonzero().flatten().tolist() == [4 * row + column]


def test_patches_are_drawn_where_their_token_stands() -> None:
    """The decoder's first convolution reaches one patch further; the middle of it is made to copy."""
    model = tokenizer(depth=0)
    with torch.no_grad():
        model.decoder[0].weight[:, :, 0] = model.decoder[0].weight[:, :, 2] = 0
        model.decoder[0].weight[:, :, :, 0] = model.decoder[0].weight[:, :, :, 2] = 0
    plain = torch.zeros(1, 8, dtype=torch.long)
    for position in range(8):
        marked = plain.clone()
        marked[0, position] = 7
        changed = (model.decode(marked) != model.decode(plain))[0].any(0).nonzero()
        row, column = divmod(position, 4)
        low, high = changed.amin(0).tolist(), changed.amax(0).tolist()
        assert (low, high) == ([4 * row, 4 * column], [4 * row + 3, 4 * column + 3])


def test_pixels_of_a_patch_keep_their_order() -> None:
    """The last convolution numbers 3·h·w outputs by channel, row, column."""
    model = tokenizer(depth=0)
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.copy_(torch.arange(48))
    picture = model.decode(torch.zeros(1, 8, dtype=torch.long))[0]
    assert torch.equal(picture[:, :4, :4].flatten(), torch.arange(48.0))
    assert torch.equal(picture[:, 4:, 12:], picture[:, :4, :4])


def test_decoding_the_codes_is_the_reconstruction_that_was_trained() -> None:
    model = tokenizer()
    images = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (3, model.num_tokens) == (3, 8) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < model.num_codes == 12
    torch.testing.assert_close(model.decode(tokens), model(images).detach())


def test_it_learns() -> None:
    model = tokenizer(levels=(8, 8, 8)).train()
    images = torch.rand(4, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(images) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.encoder[0].parameters())


def test_the_config_survives_json() -> None:
    import json

    config = tokenizer().config
    assert FSQTokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.grid == (2, 4)


@pytest.mark.parametrize("levels", [(2,), (8, 8, 5, 5)])
def test_the_codebook_has_the_product_of_the_levels(levels: tuple[int, ...]) -> None:
    assert tokenizer(levels).num_codes == torch.tensor(levels).prod()


def test_features_are_what_the_codes_were_rounded_from() -> None:
    model = tokenizer((4, 3))
    images = torch.rand(2, 3, *model.picture_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = model.features(images)
    assert features.shape == (2, model.num_tokens, model.config.width)
    rows, columns = model.grid
    grid = features.transpose(1, 2).reshape(2, -1, rows, columns)
    digits = model.quantizer.digits(model.encoder[-1](grid).permute(0, 2, 3, 1))
    assert torch.equal(model.quantizer.index(digits).flatten(1), model.encode(images))


def test_pictures_of_another_size_and_scales_are_refused() -> None:
    model = tokenizer((4, 3))
    with pytest.raises(ImageRLError, match="use prepare_picture"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ImageRLError, match="no scale 2, only 1"):
        model.encode(torch.zeros(1, 3, *model.picture_size), 2)
