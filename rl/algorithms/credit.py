"""Spatial credit: what regions of a picture give to the tokens that lie there. Pure functions.

A reward that is one number a picture blames every token for every fault. Where it also says which parts are right and
where they are, such as each letter of a text, a token answers for the parts that lie on it: the same gradient in the
mean for what only these tokens decide, without the noise of all other parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

VALUE, BOX = 0, slice(1, 5)  # of a region: value, then left, top, right, bottom in [0, 1] of the picture


def coverage(boxes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the share [..., rows · columns] of each cell of a grid that boxes [..., 4] cover, row by row."""
    left, top, right, bottom = (boxes[..., side, None] for side in range(4))
    rows, columns = grid
    y, x = np.arange(rows), np.arange(columns)
    down = np.clip(np.minimum(bottom * rows, y + 1) - np.maximum(top * rows, y), 0, 1)  # [..., rows]
    across = np.clip(np.minimum(right * columns, x + 1) - np.maximum(left * columns, x), 0, 1)
    cells: np.ndarray = down[..., :, None] * across[..., None, :]
    return cells.reshape(*boxes.shape[:-1], rows * columns)


def region_credit(regions: np.ndarray, group_size: int, grid: tuple[int, int]) -> Tensor:
    """Return the credit [B, T] float64 of tokens that lie on a grid of rows and columns, T of them.

    `regions` [B, K, 5] hold value and box of each of K regions, the same K in the same order for all samples of a
    group; NaN where a sample has fewer or a value is missing. A token is given the sum over the regions of

        share of the token's cell in the region · (value − mean value of this region in the group)

    so that the credits of a group's samples are compared with each other and those of equal samples are 0."""
    values = regions[..., VALUE].reshape(-1, group_size, regions.shape[1])  # [P, G, K]
    known = np.isfinite(values)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    mean = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / count
    worth = np.where(known, values - mean, 0.0).reshape(len(regions), -1, 1)  # [B, K, 1]
    return torch.from_numpy((worth * np.nan_to_num(coverage(regions[..., BOX], grid))).sum(axis=1))
