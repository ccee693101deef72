import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagerl.rl.files import grids
from imagerl.rl.files.grids import image_grid, save_image


def test_grid_keeps_every_pixel_in_its_place():
    pictures = np.random.default_rng(0).integers(0, 256, size=(5, 4, 6, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(pictures, columns=2, scale=3))
    assert grid.shape == (8 + 3 * (12 + 8), 8 + 2 * (18 + 8), 3)
    for i, picture in enumerate(pictures):
        y, x = 8 + i // 2 * 20, 8 + i % 2 * 26
        assert np.array_equal(grid[y : y + 12 : 3, x : x + 18 : 3], picture)
        assert np.array_equal(grid[y + 2 : y + 12 : 3, x + 2 : x + 18 : 3], picture)
    assert (grid[48:, 34:] == 255).all()  # the empty sixth place


def test_captions_stay_under_their_picture():
    black = [np.zeros((20, 60, 3), np.uint8)] * 2
    captions = ["a caption much too long for a picture of sixty pixels", "𝔲nbreakablyLongSingleWord"]
    bare, grid = (np.asarray(image_grid(black, 2, text)) for text in (None, captions))
    assert np.array_equal(grid[:28], bare[:28])
    below = grid[28:]
    assert below.shape[0] > 30 and below.min() < 120
    assert (below[:, 68:76] == 255).all() and (below[:, :8] == 255).all() and (below[:, -8:] == 255).all()
    assert np.array_equal(grid, np.asarray(image_grid(black, 2, captions)))


def test_smaller_pictures_stand_in_the_middle_of_their_cell():
    large, small = np.zeros((20, 40, 3), np.uint8), np.full((10, 20, 3), 100, np.uint8)
    grid = np.asarray(image_grid([large, small], 1))
    cells = grid[8:-8, 8:-8]
    assert (cells[:20] == 0).all() and (cells[-15:-5, 10:30] == 100).all()
    assert (cells[-20:-15] == 255).all() and (cells[-15:-5, :10] == 255).all()


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (np.zeros((0, 2, 2, 3), np.uint8), None),
        (np.zeros((1, 2, 2, 3), np.float32), None),
        (np.zeros((2, 2, 2, 3), np.uint8), ["one"]),
    ],
)
def test_grid_refuses_what_it_cannot_draw(images, captions):
    with pytest.raises(ValueError, match=r"images must be|2 images but 1 captions"):
        image_grid(images, 2, captions)


def test_saved_picture_reads_back(tmp_path):
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    path = save_image(Image.fromarray(picture), tmp_path / "samples" / "step_000001.png")
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert os.listdir(path.parent) == ["step_000001.png"]


def _ink_heights(width):
    """Heights of a caption's letters under a picture of that width, as parts of it."""
    grid = np.asarray(image_grid([np.full((8, width, 3), 255, np.uint8)], 1, ["HHHH"]).convert("L"))
    rows = np.flatnonzero((grid < 200).any(1))
    return (rows[-1] - rows[0] + 1) / width


def test_captions_are_as_large_in_large_pictures():
    """A grid of 1024-pixel pictures is shown as small as one of 192: its captions must shrink as little."""
    assert 0.05 < _ink_heights(192) < 0.08
    assert _ink_heights(1024) == pytest.approx(_ink_heights(192), rel=0.1)


def test_each_piece_of_a_caption_has_a_font_with_its_characters(monkeypatch, caplog, tmp_path):
    dejavu = grids._ours()[0]
    other = tmp_path / "other.ttf"
    other.write_bytes(dejavu.read_bytes())
    characters = {dejavu: frozenset(map(ord, "ab ")), other: frozenset(map(ord, "河"))}
    monkeypatch.setattr(grids, "_ours", lambda: [dejavu])
    monkeypatch.setattr(grids, "_of_the_machine", lambda: [other])
    monkeypatch.setattr(grids, "_characters", characters.__getitem__)
    for function in (grids._file_for, grids._tell_missing):
        function.cache_clear()
    drawn = [(Path(font.path), text) for font, text in grids._runs("a 河b", 12)]
    assert drawn == [(dejavu, "a "), (other, "河"), (dejavu, "b")] and not caplog.messages
    assert [text for _, text in grids._runs("ξξ川🚀", 12)] == ["ξξ川🚀"]
    assert caplog.messages == [
        f"captions have characters ({script}) that no font of this machine has; install one that has (a .ttf or "
        ".otf file in ~/.fonts will do)"
        for script in ("GREEK", "CJK", "SYMBOLS")
    ]
    grids._file_for.cache_clear()


def test_scripts_without_blanks_are_broken_anywhere(monkeypatch):
    monkeypatch.setattr(
        grids, "_runs", lambda text, size: iter([(grids._font(grids._ours()[0], size), text)])
    )
    assert grids._fit("河" * 30, 100, 12)[:2] == ["河" * len(grids._fit("河" * 30, 100, 12)[0])] * 2
