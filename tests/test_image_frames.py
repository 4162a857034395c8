"""Which way a picture stands, and which of its frames is read."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phisight.images import ImageNotice, open_image
from phisight.naflex import preprocess


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# The upright picture, three rows of two; EXIF says for each orientation which visual side the stored rows and
# columns start from.
UPRIGHT = np.array([[[1, 0, 0], [2, 0, 0]], [[3, 0, 0], [4, 0, 0]], [[5, 0, 0], [6, 0, 0]]], dtype=np.uint8)
STORED = {
    1: [[1, 2], [3, 4], [5, 6]],  # rows from the top, columns from the left
    2: [[2, 1], [4, 3], [6, 5]],  # top, right
    3: [[6, 5], [4, 3], [2, 1]],  # bottom, right
    4: [[5, 6], [3, 4], [1, 2]],  # bottom, left
    5: [[1, 3, 5], [2, 4, 6]],  # left, top
    6: [[2, 4, 6], [1, 3, 5]],  # right, top
    7: [[6, 4, 2], [5, 3, 1]],  # right, bottom
    8: [[5, 3, 1], [6, 4, 2]],  # left, bottom
}


def _stored(orientation: int) -> tuple[Image.Image, Image.Exif]:
    red = np.array(STORED[orientation], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.stack([red, red * 0, red * 0], axis=-1)), exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(image_format: str, orientation: int) -> None:
    image, exif = _stored(orientation)
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = _encode(image, image_format, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        opened = open_image(source)
        np.testing.assert_array_equal(np.asarray(opened), UPRIGHT)
        np.testing.assert_array_equal(np.asarray(open_image(opened)), UPRIGHT)
        assert preprocess(opened).original_size == (2, 3)


def test_orientation_of_a_loaded_image_and_of_grey() -> None:
    image, exif = _stored(6)
    image.info["exif"] = exif.tobytes()
    grey = image.getchannel(0)
    grey.info["exif"] = exif.tobytes()
    np.testing.assert_array_equal(np.asarray(open_image(image)), UPRIGHT)
    np.testing.assert_array_equal(np.asarray(open_image(grey))[:, :, 1], UPRIGHT[:, :, 0])
    assert image.size == (3, 2) and image.info["exif"] == exif.tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_means_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(_encode(Image.new("RGB", (4, 2)), "PNG", exif=exif)).size == (4, 2)


def test_exif_that_cannot_be_read_is_said() -> None:
    image = Image.new("RGB", (4, 2))
    image.info["exif"] = b"Exif\0\0no TIFF header"
    with pytest.warns(ImageNotice, match="<image> has EXIF data that cannot be read"):
        assert open_image(image).size == (4, 2)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("alpha", [False, True])
def test_the_first_frame_is_taken_and_said(image_format: str, alpha: bool, tmp_path: Path) -> None:
    mode = "RGBA" if alpha else "RGB"
    frames = [Image.new(mode, (8, 6), colour) for colour in ("red", "blue", "lime")]
    if alpha:
        frames[0].putpixel((1, 1), (9, 9, 9, 0))
    options = {"lossless": True} if image_format == "WEBP" else {}
    path = tmp_path / "moving.bin"
    path.write_bytes(_encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options))
    with pytest.warns(ImageNotice, match=r"moving\.bin holds several frames: only the first") as notices:
        image = open_image(path)
        preprocess(image)  # says nothing a second time
    assert len(notices) == 1
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((1, 1)) == ((255, 255, 255) if alpha else (255, 0, 0))


def test_the_frame_that_its_owner_chose_is_taken() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    chosen = Image.open(io.BytesIO(_encode(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    chosen.seek(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(chosen).getpixel((0, 0)) == (0, 0, 255)
    assert chosen.tell() == 1


def test_a_still_picture_gives_no_notice() -> None:
    preview = _encode(Image.new("RGB", (16, 16)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(_encode(Image.new("L", (10, 10)), "GIF")).size == (10, 10)
        assert open_image(preview).size == (16, 16)  # a phone's JPEG with a preview behind it
