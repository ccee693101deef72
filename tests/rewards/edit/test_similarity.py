"""Similarities under a mask: by hand, and against slow loops."""

import numpy as np
import pytest

from imagerl.rewards.edit.similarity import (
    CELL,
    COLOUR_RANGE,
    CONTRAST,
    LUMINANCE,
    WINDOW,
    colour_similarity,
    correlation,
    feature_similarity,
    gradient_features,
    ssim,
)

RNG = np.random.default_rng(0)
A, B = RNG.random((12, 15, 3)), RNG.random((12, 15, 3))
ALL = np.ones((12, 15))
HALF = np.pad(np.ones((12, 8)), ((0, 0), (0, 7)))


def slow_ssim(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """One window after another, over its pixels of weight 1."""
    values, half = [], WINDOW // 2
    for y, x in np.argwhere(weight == 1):
        window = np.s_[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
        known = weight[window] == 1
        channels = []
        for c in range(3):
            p, q = a[window][..., c][known], b[window][..., c][known]
            covariance = ((p - p.mean()) * (q - q.mean())).mean()
            channels.append(
                (2 * p.mean() * q.mean() + LUMINANCE)
                * (2 * covariance + CONTRAST)
                / ((p.mean() ** 2 + q.mean() ** 2 + LUMINANCE) * (p.var() + q.var() + CONTRAST))
            )
        values.append(np.mean(channels))
    return float(np.mean(values))


@pytest.mark.parametrize("weight", [ALL, HALF])
def test_ssim_against_loops(weight: np.ndarray) -> None:
    mixed = 0.6 * A + 0.4 * B
    assert ssim(A, mixed, weight) == pytest.approx(slow_ssim(A, mixed, weight), abs=1e-9)
    assert ssim(A, A, weight) == pytest.approx(1.0)


def test_masked_pixels_do_not_matter() -> None:
    changed = A.copy()
    changed[:, 8:] = 0.0
    assert ssim(A, changed, HALF) == pytest.approx(1.0)
    assert colour_similarity(A, changed, HALF) == pytest.approx(1.0)
    assert ssim(A, changed, ALL) < 0.9


def test_colour_similarity_by_hand() -> None:
    black, grey = np.zeros((4, 4, 3)), np.full((4, 4, 3), COLOUR_RANGE / 2)
    assert colour_similarity(black, grey, np.ones((4, 4))) == pytest.approx(0.5)
    assert colour_similarity(black, black + 1, np.ones((4, 4))) == 0.0
    assert np.isnan(colour_similarity(black, grey, np.zeros((4, 4))))
    assert np.isnan(ssim(black, grey, np.zeros((4, 4))))


def test_correlation_by_hand() -> None:
    a = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert correlation(a, 5 - 2 * a) == 0.0  # -1, but no less than nothing
    assert correlation(a, 2 * a + 1) == pytest.approx(1.0)
    assert correlation(a, np.ones((2, 2))) == 0.0
    assert correlation(np.zeros((2, 2)), np.ones((2, 2))) == 1.0


def test_features_by_hand() -> None:
    one, other = np.array([[[3.0, 4.0]]]), np.array([[[4.0, 3.0]]])
    weight = np.ones((4, 4))
    assert feature_similarity(one, one, weight) == 1.0
    assert feature_similarity(one, other, weight) == pytest.approx(2 * 24 / 50, abs=1e-3)
    assert feature_similarity(one, -one, weight) == 0.0
    assert feature_similarity(0 * one, 0 * one, weight) == 1.0


def test_gradients_see_edges_and_their_place() -> None:
    edge = np.zeros((16, 32, 3))
    edge[:, 10:] = 1.0
    features = gradient_features(edge)
    assert features.shape == (16 // CELL, 32 // CELL, 24)
    assert features[:, 2].any() and not features[:, 4:].any()  # columns 9 and 10 lie in the third cell
    weight = np.ones((16, 32))
    moved = gradient_features(np.roll(edge, 8, axis=1) * (np.arange(32) >= 8)[None, :, None])
    assert feature_similarity(features, moved, weight) == pytest.approx(6 / 8, abs=1e-2)
    assert feature_similarity(features, gradient_features(0.5 * edge), weight) > 0.9
