from __future__ import annotations

import numpy as np
import pytest

from rewards.fidelity import LUMINANCE, WINDOW, absolute_error, kept_region, similarity


def noise(seed: int, shape: tuple[int, ...] = (16, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_what_need_not_change_is_where_both_agree() -> None:
    reference = noise(0)
    ideal = reference.copy()
    ideal[2:5, 3] ^= 1
    kept = kept_region(reference, ideal)
    assert kept.shape == (16, 20) and (~kept).sum() == 3 and not kept[2:5, 3].any()


def test_absolute_error_by_hand() -> None:
    image, other = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    image[0, 1], other[1, 0] = (255, 0, 0), (255, 255, 255)
    assert absolute_error(image, other) == pytest.approx(np.array([[0, 1 / 3], [1, 0]]))


def test_similarity_is_one_only_for_the_same_picture() -> None:
    image, other = noise(0), noise(1)
    assert similarity(image, image) == pytest.approx(1.0)
    assert abs(similarity(image, other)).mean() < 0.3
    assert similarity(image, other) == pytest.approx(similarity(other, image))
    assert similarity(image, 255 - image).mean() < -0.8


def test_similarity_of_flat_pictures_by_hand() -> None:
    """Without variance only the means count: (2xy + c) / (x² + y² + c)."""
    dark, bright = np.full((9, 9, 3), 51, np.uint8), np.full((9, 9, 3), 204, np.uint8)
    wanted = (2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4)
    assert similarity(dark, bright) == pytest.approx(wanted)


def test_similarity_is_the_formula_over_each_window() -> None:
    image, other = noise(2), noise(3)
    x, y = (picture.astype(float) @ LUMINANCE / 255 for picture in (image, other))
    half = WINDOW // 2
    for row, column in ((half, half), (9, 12)):
        window = np.s_[row - half : row + half + 1, column - half : column + half + 1]
        a, b = x[window].ravel(), y[window].ravel()
        covariance = np.cov(a, b)
        wanted = (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
        wanted /= (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)
        assert similarity(image, other)[row, column] == pytest.approx(wanted, rel=1e-9)


def test_a_change_is_felt_within_its_window_only() -> None:
    image = noise(4)
    other = image.copy()
    other[8, 10] ^= 255
    changed = similarity(image, other) < 1 - 1e-9
    assert changed.sum() == WINDOW**2 and changed[8 - 3 : 8 + 4, 10 - 3 : 10 + 4].all()
