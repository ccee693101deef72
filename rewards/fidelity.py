"""How far a picture is from another one, and from a third outside what had to change. Pure functions of arrays."""

from __future__ import annotations

import numpy as np

WINDOW = 7  # pixels; odd
LUMINANCE = np.array([0.299, 0.587, 0.114])


def kept_region(reference: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """[H, W] bool: the pixels of [H, W, 3] uint8 that a perfect edit leaves as they were."""
    return (reference == ideal).all(-1)


def absolute_error(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[H, W] mean absolute difference over the channels of [H, W, 3] uint8, in 0..1."""
    return np.abs(image.astype(np.float64) - other).mean(-1) / 255


def similarity(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[H, W] SSIM of the luminance of [H, W, 3] uint8 (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    Means and unbiased variances over a window around each pixel, rims mirrored; 1 where both agree."""
    x, y = (picture.astype(np.float64) @ LUMINANCE / 255 for picture in (image, other))
    stabiliser_1, stabiliser_2 = 0.01**2, 0.03**2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    # Rounding can leave the variance of a flat window just below zero.
    var_x = np.maximum(_window_mean(x * x) - mean_x**2, 0) * unbiased
    var_y = np.maximum(_window_mean(y * y) - mean_y**2, 0) * unbiased
    covariance = (_window_mean(x * y) - mean_x * mean_y) * unbiased
    likeness = (2 * mean_x * mean_y + stabiliser_1) * (2 * covariance + stabiliser_2)
    return likeness / ((mean_x**2 + mean_y**2 + stabiliser_1) * (var_x + var_y + stabiliser_2))


def _window_mean(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, WINDOW // 2, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW))
    return windows.mean(axis=(-2, -1))
