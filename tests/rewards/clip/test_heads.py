"""Heads by hand, and beside the same network in torch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imagerl.rewards.clip.heads import PictureHead, cosine, direction, similarity
from imagerl.rewards.clip.reward import ClipReward
from imagerl.rewards.hub import read_tensors
from imagerl.rl.types import ImageRLError


def test_similarities_by_hand() -> None:
    alike = cosine(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    assert alike.tolist() == pytest.approx([0.6, -0.6])
    assert similarity("cosine", alike, 10.0, -1.0) is alike
    assert similarity("clipscore", alike, 10.0, -1.0).tolist() == pytest.approx([1.5, 0.0])
    assert similarity("logit", alike, 10.0, -1.0).tolist() == pytest.approx([5.0, -7.0])
    assert similarity("probability", alike, 10.0, -1.0).tolist() == pytest.approx(
        [0.9933071, 0.0009111], abs=1e-6
    )


def test_features_of_two_sizes_are_refused() -> None:
    with pytest.raises(ImageRLError, match="makes 2 numbers of a picture and 3 of a caption"):
        cosine(torch.ones(1, 2), torch.ones(1, 3))


def test_direction_by_hand() -> None:
    east, north, west = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 0.0]])
    assert direction(north, east, north, east).item() == pytest.approx(1.0)
    assert direction(east, north, north, east).item() == pytest.approx(-1.0)
    assert direction(west, east, north, east).item() == pytest.approx(2**-0.5)  # (-2, 0) against (-1, 1)
    assert direction(east, east, north, east).item() == 0.0
    rounded = torch.tensor([[1.0, 1e-6]])  # just the direction asked for, but by rounding alone
    assert direction(rounded, east, north, east).item() == pytest.approx(2**-0.5 * 1e-6 / 0.02)


def laion_layout() -> nn.Sequential:
    """The aesthetic predictor's: linear layers with dropout between, so that their numbers have gaps."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.Dropout(0.2),
        nn.Linear(5, 4),
        nn.Dropout(0.2),
        *[nn.Identity()] * 6,
        nn.Linear(4, 1),
    )


def head_of(path: Path, activation: str = "none") -> PictureHead:
    return PictureHead(read_tensors(str(path), "clip"), str(path), activation)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_network_gives_what_it_gives_in_torch(suffix: str, tmp_path: Path) -> None:
    network = laion_layout().eval()  # layers 0, 2 and 10: in the order of numbers, not of letters
    path = tmp_path / f"head{suffix}"
    state = {f"layers.{name}": value for name, value in network.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    features = nn.functional.normalize(torch.randn(3, 6), dim=-1)
    head = head_of(path)
    head.check_width(6)
    torch.testing.assert_close(head(features), network(features)[:, 0])
    relu = nn.Sequential(network[0], nn.ReLU(), network[2], nn.ReLU(), network[-1])
    torch.testing.assert_close(head_of(path, "relu")(features), relu(features)[:, 0])
    with pytest.raises(ImageRLError, match="takes 6 numbers of a picture, the model makes 768"):
        head.check_width(768)


def test_heads_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(ImageRLError, match="there is no file cosinus, and it is none of cosine, clipscore"):
        ClipReward("tiny_clip", head="cosinus")
    save_file({"a.weight": torch.ones(3)}, path)
    with pytest.raises(ImageRLError, match="holds no linear layer"):
        head_of(path)
    save_file({"0.weight": torch.ones(3, 2), "1.weight": torch.ones(1, 4)}, path)
    with pytest.raises(ImageRLError, match="do not lead to 1 number: 2 to 3, 4 to 1"):
        head_of(path)
    save_file({"0.weight": torch.ones(3, 2)}, path)
    with pytest.raises(ImageRLError, match="do not lead to 1 number: 2 to 3"):
        head_of(path)
    with pytest.raises(ImageRLError, match="activation must be one of none, relu, gelu"):
        head_of(path, "swish")
    path.write_text("nothing")
    with pytest.raises(ImageRLError, match="cannot be read as a file of tensors"):
        head_of(path)
    torch.save({"0.weight": Path("a pickle")}, tmp_path / "head.pt")
    with pytest.raises(ImageRLError, match="UnpicklingError"):
        head_of(tmp_path / "head.pt")
