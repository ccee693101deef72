from __future__ import annotations

import torch

from imagerl.rl.data.tiny.world import split_of
from tools.tiny import janus
from tools.tiny.number_world import numbers


def test_the_corners_of_a_cube_are_found_by_their_signs() -> None:
    corners = janus.corners(3)
    torch.testing.assert_close(corners.norm(dim=1), torch.ones(8))
    assert torch.equal((corners > 0).long() @ torch.tensor([1, 2, 4]), torch.arange(8))


def test_numbers_of_the_two_splits_are_apart() -> None:
    train, heldout = (set(numbers(split)) for split in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 1000 and split_of(min(heldout)) == "heldout"
