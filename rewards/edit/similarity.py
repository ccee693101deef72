"""Compare two pictures under a mask, by colour, structure and features. Pure functions.

Pictures are [H, W, 3] float64 in [0, 1], maps [H, W]; `weight` [H, W] in [0, 1] says where to look. All
similarities lie in [0, 1] and are NaN where the weight leaves too little to look at."""

from __future__ import annotations

import numpy as np

WINDOW = 7  # pixels, of SSIM
LUMINANCE, CONTRAST = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1] (Wang et al., 2004)
LEAST = 0.01  # share of the picture that must be looked at
COLOUR_RANGE = 0.15  # mean absolute difference from which colours have nothing in common
ORIENTATIONS = 8  # of the gradient features
CELL = 4  # pixels a side, over which they are summed
FLAT = 0.05  # gradient energy of a cell that counts as structure


def colour_similarity(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Return 1 − mean |a − b| / COLOUR_RANGE, at least 0."""
    if weight.mean() < LEAST:
        return float("nan")
    difference = np.abs(a - b).mean(axis=-1)
    return max(0.0, 1.0 - float((difference * weight).sum() / weight.sum()) / COLOUR_RANGE)


def ssim(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Return the mean structural similarity of two pictures or maps, at least 0.

    Means and variances of a window are those of its looked-at pixels alone, so what a mask hides does not reach
    over its rim."""
    if weight.mean() < LEAST:
        return float("nan")
    a, b = (x[..., None] if x.ndim == 2 else x for x in (a, b))
    w = weight[..., None]
    count = np.maximum(_box(w), 1e-9)
    mean_a, mean_b = _box(w * a) / count, _box(w * b) / count
    variance_a = np.maximum(_box(w * a * a) / count - mean_a**2, 0)
    variance_b = np.maximum(_box(w * b * b) / count - mean_b**2, 0)
    covariance = _box(w * a * b) / count - mean_a * mean_b
    values = (2 * mean_a * mean_b + LUMINANCE) * (2 * covariance + CONTRAST)
    values /= (mean_a**2 + mean_b**2 + LUMINANCE) * (variance_a + variance_b + CONTRAST)
    return max(0.0, float((values.mean(axis=-1) * weight).sum() / weight.sum()))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's of two maps, at least 0; 0 where just one of them is constant, 1 where both are."""
    a, b = a - a.mean(), b - b.mean()
    spreads = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if not spreads:
        return float(not (a.any() or b.any()))
    return max(0.0, float((a * b).sum()) / spreads)


def feature_similarity(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Return 2 a·b / (a² + b²) of the features [h, w, D] of two pictures, averaged over places, at least 0.

    LPIPS in shape (arXiv 1801.03924): features are compared place by place and averaged under the mask, which is
    averaged down to their grid. Two places without any feature are alike."""
    cells = _pooled(weight, a.shape[:2])
    if cells.mean() < LEAST:
        return float("nan")
    flat = FLAT**2
    alike = (2 * (a * b).sum(axis=-1) + flat) / ((a * a).sum(axis=-1) + (b * b).sum(axis=-1) + flat)
    return max(0.0, float((alike * cells).sum() / cells.sum()))


def gradient_features(picture: np.ndarray) -> np.ndarray:
    """Return [h, w, 3·ORIENTATIONS]: how much each colour channel changes in each direction, by cells of CELL
    pixels.

    The default where no network is given: it sees shapes and their place, not flat colours."""
    rows, columns = np.gradient(picture, axis=(0, 1))
    strength = np.hypot(rows, columns)  # [H, W, 3]
    sector = np.floor(np.mod(np.arctan2(rows, columns), 2 * np.pi) / (2 * np.pi) * ORIENTATIONS).astype(int)
    bins = [np.where(sector == number, strength, 0.0) for number in range(ORIENTATIONS)]
    stacked = np.concatenate(bins, axis=-1)
    height, width = (max(1, size // CELL) for size in picture.shape[:2])
    return _pooled(stacked, (height, width))


def _box(values: np.ndarray) -> np.ndarray:
    """Return sums over WINDOW×WINDOW pixels around each of [H, W, C]; beyond the rim is 0."""
    half = WINDOW // 2
    for axis in (0, 1):
        padding = [(half + 1, half) if a == axis else (0, 0) for a in range(values.ndim)]
        total = np.cumsum(np.pad(values, padding), axis=axis)
        size = values.shape[axis]
        values = total.take(range(WINDOW, WINDOW + size), axis) - total.take(range(size), axis)
    return values


def _pooled(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return means of [H, W, ...] over a grid of h×w cells, which may differ in size by a pixel."""
    for axis, cells in enumerate(grid):
        edges = np.linspace(0, values.shape[axis], cells + 1).astype(int)
        starts = np.minimum(edges[:-1], values.shape[axis] - 1)
        sizes = np.maximum(np.diff(edges), 1).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = np.add.reduceat(values, starts, axis=axis) / sizes
    return values
