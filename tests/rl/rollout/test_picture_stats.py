from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from imagerl.rl.rollout.picture_stats import (
    SIDE,
    group_stats,
    mean_of_groups,
    picture_stats,
    pixel_diversity,
    thumbnails,
    token_diversity,
)
from imagerl.rl.types import Prompt, RolloutGroup


def plain(*colours: tuple[int, int, int], height: int = 4, width: int = 8) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def test_statistics_of_plain_pictures() -> None:
    stats = picture_stats(plain((255, 0, 0), (0, 0, 0), (128, 128, 128), (200, 100, 50)))
    assert stats["brightness"] == pytest.approx(
        [0.299, 0, 128 / 255, (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255], abs=1e-6
    )
    assert stats["saturation"] == pytest.approx([1, 0, 0, 0.75], abs=1e-6)
    assert stats["contrast"] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert stats["clipped"] == pytest.approx([1, 1, 0, 0])
    assert stats["blank"].tolist() == [1, 1, 1, 1]


def test_statistics_of_a_picture_of_two_halves() -> None:
    image = plain((0, 0, 0))
    image[:, :, 4:] = (255, 255, 255)
    stats = picture_stats(image)
    assert stats["brightness"][0] == pytest.approx(0.5) and stats["contrast"][0] == pytest.approx(0.5)
    assert stats["clipped"][0] == 1 and stats["blank"][0] == 0


def test_faint_noise_is_blank_and_equal_luma_is_not() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(126, 131, (1, 16, 16, 3), dtype=np.uint8)  # standard deviation 1.4 of 255
    assert picture_stats(noise)["blank"].tolist() == [1]
    coloured = plain((100, 0, 0), height=16, width=16)
    coloured[:, :8] = (0, 51, 0)  # luma 29.9 in both halves
    assert picture_stats(coloured)["contrast"][0] < 1e-3 and picture_stats(coloured)["blank"].tolist() == [0]


def test_large_pictures_are_looked_at_in_part() -> None:
    image = np.zeros((1, 2 * SIDE, 4 * SIDE, 3), np.uint8)
    image[:, ::4, ::4] = 255  # all that is looked at
    assert picture_stats(image)["brightness"][0] == pytest.approx(1)


def test_token_diversity_is_the_mean_hamming_distance_of_pairs() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9, 9, 9]])
    assert token_diversity(tokens) == pytest.approx((1 / 4 + 3 / 4 + 3 / 4) / 3)
    assert token_diversity(tokens[:1].repeat(5, 1)) == 0
    assert token_diversity(torch.arange(12).reshape(3, 4)) == pytest.approx(1)


def test_thumbnails_are_block_means_without_the_rim() -> None:
    image = np.zeros((1, 33, 64, 3), np.uint8)  # blocks of 4 x 4, the last row is left over
    image[0, 0:4, 4:8] = 200
    image[0, 0, 0] = 160
    small = thumbnails(image)
    assert small.shape == (1, 8, 16, 3)
    assert small[0, 0, 1] == pytest.approx(200 / 255) and small[0, 0, 0] == pytest.approx(10 / 255)
    assert thumbnails(np.zeros((2, 1, 5, 3), np.uint8)).shape == (2, 1, 5, 3)
    assert thumbnails(np.zeros((2, 1, 40, 3), np.uint8)).shape == (2, 1, 40, 3)  # blocks fit the shorter side


def test_pixel_diversity_is_over_all_pairs() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 16, 3), dtype=np.uint8)
    scaled = images / 255
    squares = [np.square(scaled[a] - scaled[b]).mean() for a, b in combinations(range(5), 2)]
    assert pixel_diversity(images) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    assert pixel_diversity(images[:1].repeat(4, axis=0)) == 0
    assert pixel_diversity(plain((0, 0, 0), (255, 255, 255))) == pytest.approx(1)


def test_a_step_is_the_mean_over_its_groups() -> None:
    def group(tokens: list[list[int]], images: np.ndarray) -> RolloutGroup:
        ids = torch.tensor(tokens)
        return RolloutGroup(Prompt(0, ""), ids, ids.float(), ids.bool(), images)

    groups = [
        group([[1, 2], [1, 3]], plain((0, 0, 0), (255, 255, 255))),
        group([[4, 4], [4, 4]], plain((255, 255, 255), (255, 255, 255))),
    ]
    step = mean_of_groups([group_stats(group) for group in groups])
    assert step["diversity/tokens"] == 0.25 and step["diversity/pixels"] == pytest.approx(0.5)
    assert step["pictures/brightness"] == pytest.approx(0.75) and step["pictures/blank"] == 1
    assert mean_of_groups([]) == {}
