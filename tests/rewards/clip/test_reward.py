"""The CLIP rewards: which samples have a value, what is computed how often, and directions of constructed edits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imagerl.rewards.base import load_reward
from imagerl.rewards.clip import reward as clip
from imagerl.rewards.clip.memory import Remembered
from imagerl.rewards.clip.models import ClipModel
from imagerl.rewards.clip.reward import ClipDirectionReward, ClipReward, decoded
from imagerl.rl.types import ImageRLError
from tests.rewards.clip_folders import need_open_clip, open_clip_folder

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourModel:
    """A picture's feature is its mean colour, a caption's the colour it names. Keeps what it was asked."""

    def __init__(self, captions_width: int = 3) -> None:
        self.asked: list[list[str]] = []
        self.seen: list[int] = []
        self._width = captions_width
        self.model = ClipModel(3, 10.0, -5.0, self.pictures, self.captions)

    def pictures(self, images: Sequence[Image.Image]) -> torch.Tensor:
        self.seen.append(len(images))
        means = torch.tensor(
            [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
        )
        return torch.nn.functional.normalize(means.float(), dim=-1)

    def captions(self, texts: Sequence[str]) -> torch.Tensor:
        self.asked.append(list(texts))
        named = [next((rgb for name, rgb in COLOURS.items() if name in text), (1, 1, 1)) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(named).float()[:, : self._width], dim=-1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ColourModel:
    made = ColourModel()
    monkeypatch.setattr(clip, "load_clip", lambda *_: made.model)
    return made


def plain(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 4), colour) for colour in colours]


GREEN = (0, 255, 0)  # "green" is darker in CSS


def test_values_and_parts(model: ColourModel) -> None:
    prompts, images = ["a red car", "a red car"], plain("red", "blue")
    assert list(ClipReward("m")(prompts=prompts, images=images).rewards) == [1.0, 0.0]
    output = ClipReward("m", head="logit")(prompts=prompts, images=images)
    assert list(output.rewards) == [5.0, -5.0]
    assert output.breakdown == {"cosine": [1.0, 0.0]}


def test_a_sample_without_a_caption_has_no_value(model: ColourModel) -> None:
    output = ClipReward("m")(prompts=["", "blue", "  "], images=plain("blue", "blue", "blue"))
    assert list(output.rewards) == [None, 1.0, None]
    assert output.reason == "a sample has no caption to compare its picture with"
    assert list(ClipReward("m")(prompts=[""], images=plain("red")).rewards) == [None]


def test_captions_of_a_column(model: ColourModel) -> None:
    reward = ClipReward("m", column="short")
    output = reward(prompts=["red", "red"], images=plain("blue", "blue"), short=["blue", None])
    assert list(output.rewards) == [1.0, None]
    with pytest.raises(ImageRLError, match="needs the column short"):
        reward(prompts=["red"], images=plain("blue"))
    with pytest.raises(ImageRLError, match="column short must hold texts, not 3"):
        reward(prompts=["red"], images=plain("blue"), short=[3])


def test_no_caption_is_encoded_twice(model: ColourModel) -> None:
    reward = ClipReward("m")
    model.asked.clear()
    for _ in range(2):
        reward(prompts=["red", "blue", "red"], images=plain("red", "red", "red"))
    reward(prompts=["green", "red"], images=plain("red", "red"))
    assert model.asked == [["red", "blue"], ["green"]]


def test_the_oldest_features_are_forgotten() -> None:
    calls: list[list[int]] = []

    def encode(values: list[int]) -> torch.Tensor:
        calls.append(values)
        return torch.tensor([[float(value)] for value in values])

    remembered = Remembered(encode, limit=2)
    assert remembered([1, 2, 3], [1, 2, 3]).tolist() == [[1], [2], [3]]  # more than fit
    assert remembered([3, 2], [3, 2]).tolist() == [[3], [2]]
    assert remembered([1], [1]).tolist() == [[1]]
    assert calls == [[1, 2, 3], [1]]


def test_a_head_needs_no_caption(model: ColourModel, tmp_path: Path) -> None:
    path = tmp_path / "redness.safetensors"
    save_file({"0.weight": torch.tensor([[2.0, 0.0, 0.0]]), "0.bias": torch.tensor([1.0])}, path)
    output = ClipReward("m", head=str(path))(prompts=["", "blue"], images=plain("red", "blue"))
    assert list(output.rewards) == [3.0, 1.0]
    save_file({"0.weight": torch.ones(1, 4)}, path)
    with pytest.raises(ImageRLError, match="takes 4 numbers of a picture, the model makes 3"):
        ClipReward("m", head=str(path))


def test_halves_that_do_not_fit_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "load_clip", lambda *_: ColourModel(captions_width=2).model)
    with pytest.raises(ImageRLError, match="3 numbers of a picture and 2 of a caption"):
        ClipReward("m")


def test_a_broken_picture_is_one_line() -> None:
    class Broken:
        def convert(self, mode: str) -> Image.Image:
            raise OSError("image file is truncated\n(7 bytes)")

    with pytest.raises(
        ValueError, match=r"picture 2 cannot be decoded \(OSError: image file is truncated \(7 bytes"
    ):
        decoded([*plain("red"), Broken()])  # type: ignore[list-item]


def turned(
    images: list[Any], references: list[Any], before: list[Any], after: list[Any]
) -> list[float | None]:
    reward = ClipDirectionReward("m")
    output = reward(images=images, reference=references, caption_before=before, caption_after=after)
    return list(output.rewards)


def test_direction_of_constructed_edits(model: ColourModel) -> None:
    """Right edit, half of it, the source, the wrong colour, and the way back."""
    images = [
        *plain("blue"),
        Image.new("RGB", (8, 4), (255, 0, 255)),
        *plain("red"),
        Image.new("RGB", (8, 4), GREEN),
    ]
    values = turned(images, plain("red") * 4, ["a red car"] * 4, ["a blue car"] * 4)
    right, half, source, wrong = [value if value is not None else 9.0 for value in values]
    assert right == pytest.approx(1.0)
    assert source == 0.0
    assert wrong == pytest.approx(0.5)  # (-1, 1, 0) against (-1, 0, 1)
    assert wrong < half < right
    assert turned(plain("red"), plain("blue"), ["red"], ["blue"])[0] == pytest.approx(-1.0)


def test_direction_where_it_does_not_apply(model: ColourModel) -> None:
    red, blue = plain("red", "blue")
    assert turned([blue] * 4, [red, None, red, red], ["red", "red", None, "blue"], ["blue"] * 4) == [
        pytest.approx(1.0),
        None,
        None,
        None,
    ]
    with pytest.raises(ImageRLError, match="needs the column reference"):
        ClipDirectionReward("m")(images=[blue])
    with pytest.raises(ImageRLError, match="needs the column caption_before"):
        ClipDirectionReward("m")(images=[blue], reference=[red])


def test_no_reference_is_encoded_twice(model: ColourModel) -> None:
    reward = ClipDirectionReward("m")
    captions = {"caption_before": ["red"] * 2, "caption_after": ["blue"] * 2}
    for _ in range(2):  # equal pictures, not the same objects
        reward(images=plain("blue", "blue"), reference=plain("red", "red"), **captions)
    assert model.seen == [2, 1, 2]


def test_by_name_with_a_real_model(tmp_path: Path) -> None:
    need_open_clip()
    label, reward = load_reward("clip", model=open_clip_folder(tmp_path))
    output = reward(prompts=["a red ball", "a blue box"], completions=[[], []], images=plain("red", "blue"))
    assert label == "clip"
    assert all(-1 <= value <= 1 for value in output.rewards)  # type: ignore[union-attr]
