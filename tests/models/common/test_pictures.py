from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagerl.models.common.pictures import covering_size, crop_note, prepare_picture
from imagerl.rl.files import reading
from imagerl.rl.files.reading import read_picture
from imagerl.rl.types import ImageRLError

GRADIENT = np.linspace(0, 255, 16 * 16, dtype=np.float64).reshape(16, 16)


def saved(picture: Image.Image, folder: Path, name: str = "picture.png") -> Path:
    picture.save(folder / name)
    return folder / name


def test_values_run_from_minus_one_to_one() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2] = [255, 127, 0]
    prepared = prepare_picture(Image.fromarray(pixels), (4, 4))
    assert prepared.shape == (3, 4, 4) and prepared.dtype == torch.float32
    assert prepared[:, 0, 0].tolist() == pytest.approx([1, 127 / 127.5 - 1, -1], abs=1e-6)
    assert prepared[:, 3, 3].tolist() == [-1, -1, -1]


def test_square_pictures_are_as_siglips_own_processor_makes_them() -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    wanted = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepare_picture(Image.fromarray(pixels), (32, 32)), wanted, rtol=0, atol=1e-6)


def test_another_aspect_keeps_its_middle() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    wide = Image.fromarray(pixels)
    assert (prepare_picture(wide, (10, 10)) == 1).all()
    assert (prepare_picture(wide.rotate(90, expand=True), (10, 10)) == 1).all()
    assert (
        crop_note(wide, (10, 10)) == "the picture is 30x10 pixels; it was resized and its middle 10x10 kept"
    )
    assert crop_note(wide, (5, 15)) is None
    assert prepare_picture(wide, (32, 64)).shape == (3, 32, 64)


@pytest.mark.parametrize(
    ("picture", "wanted", "covering"),
    [
        ((640, 480), (384, 384), (512, 384)),
        ((480, 640), (384, 384), (384, 512)),
        ((1000, 333), (1024, 1024), (3075, 1024)),
        ((64, 32), (64, 32), (64, 32)),
        ((1, 1), (64, 32), (64, 64)),
    ],
)
def test_the_shorter_side_is_fitted(
    picture: tuple[int, int], wanted: tuple[int, int], covering: tuple[int, int]
) -> None:
    assert covering_size(picture, wanted) == covering


def gray() -> Image.Image:
    return Image.fromarray(GRADIENT.round().astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "P", "I", "I;16", "RGBA", "LA"])
def test_every_mode_gives_the_same_gray(mode: str) -> None:
    if mode in ("I", "I;16"):
        values = (GRADIENT * 257).round()
        picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "LAB":
        pytest.importorskip("PIL.ImageCms")
        picture = gray().convert("RGB").convert("L")
    else:
        picture = gray().convert(mode) if mode in ("L", "P", "LA") else gray().convert("RGB").convert(mode)
    read = np.asarray(read_picture(picture)).astype(float)
    assert read.shape == (16, 16, 3)
    assert np.abs(read - GRADIENT[..., None]).max() <= 3


def test_black_and_white_pictures_are_read() -> None:
    bits = Image.fromarray(GRADIENT > 127)
    assert bits.mode == "1"
    assert (np.asarray(read_picture(bits)) == np.where(GRADIENT > 127, 255, 0)[..., None]).all()


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    for picture in (clear, palette):
        read = read_picture(saved(picture, tmp_path))
        assert [read.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_16_bit_files_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    read = read_picture(saved(Image.fromarray(values), tmp_path))
    assert np.asarray(read)[0, :, 0].tolist() == [0, 100, 255]


def test_pictures_stand_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    read = read_picture(tmp_path / "turned.png")
    assert read.size == (2, 4) and read.getpixel((1, 0)) == (255, 255, 255)


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(pixels), tmp_path).read_bytes()
    files = {
        name: tmp_path / name for name in ("cut.png", "text.png", "empty.png", "absent.png", "float.tiff")
    }
    files["cut.png"].write_bytes(whole[: len(whole) // 2])
    files["text.png"].write_text("no picture")
    files["empty.png"].touch()
    Image.fromarray(GRADIENT.astype(np.float32)).save(files["float.tiff"])
    for name, file in files.items():
        with pytest.raises(ImageRLError, match=name) as told:
            prepare_picture(file, (8, 8))
        assert "\n" not in str(told.value)
    with pytest.raises(ImageRLError, match="cannot read"):
        read_picture(tmp_path)
    monkeypatch.setattr(reading, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(reading, "to_rgb", None)  # nothing is decoded
    with pytest.raises(ImageRLError, match="64x64 pixels; at most 4095"):
        read_picture(tmp_path / "picture.png")
