"""Every mode and array type to RGB, with values worked out by hand."""

from __future__ import annotations

import re
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from phisight.errors import ImageError
from phisight.images import ImageNotice, open_image

Colour = tuple[int, int, int]
WHITE = (255, 255, 255)


def _rgb(source: Any) -> list[Colour]:
    """Pixels of the opened picture, row by row."""
    image = open_image(source)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def _pixels(mode: str, data: bytes, width: int) -> Image.Image:
    return Image.frombytes(mode, (width, 1), data)


@pytest.mark.parametrize(
    ("mode", "data", "expected"),
    [
        ("RGB", bytes([1, 2, 3, 4, 5, 6]), [(1, 2, 3), (4, 5, 6)]),
        ("L", bytes([0, 7, 255]), [(0, 0, 0), (7, 7, 7), WHITE]),
        # (100 * 128 + 255 * 127) / 255 = 177.2; hidden grey under alpha 0 is gone.
        ("LA", bytes([100, 128, 9, 0, 9, 255]), [(177, 177, 177), WHITE, (9, 9, 9)]),
        # Alpha 51 is a fifth: 200 / 5 + 204 = 244, 0 + 204, 51 + 204.
        ("RGBA", bytes([200, 0, 255, 51, 1, 2, 3, 0, 1, 2, 3, 255]), [(244, 204, 255), WHITE, (1, 2, 3)]),
        # Premultiplied: the same pixels; 40 is 200 / 5.
        ("RGBa", bytes([40, 0, 51, 51, 0, 0, 0, 0, 1, 2, 3, 255]), [(244, 204, 255), WHITE, (1, 2, 3)]),
        ("La", bytes([20, 128, 0, 0, 9, 255]), [(147, 147, 147), WHITE, (9, 9, 9)]),
        ("RGBX", bytes([1, 2, 3, 0]), [(1, 2, 3)]),
        # Black 51 leaves 204; cyan 100 takes 100 * 204 / 255 = 80 of it, magenta 50 takes 40.
        ("CMYK", bytes([0, 0, 0, 0, 255, 0, 0, 0, 100, 50, 0, 51]), [WHITE, (0, 255, 255), (124, 164, 204)]),
        # JFIF: R = 76 + 1.402 * 127 = 254.05, G = 76 + 14.8 - 90.7 = 0.1, B = 76 - 76.2.
        ("YCbCr", bytes([90, 128, 128, 76, 85, 255]), [(90, 90, 90), (254, 0, 0)]),
        ("HSV", bytes([0, 255, 255, 85, 255, 255, 0, 0, 33]), [(255, 0, 0), (0, 255, 0), (33, 33, 33)]),
    ],
)
def test_modes(mode: str, data: bytes, expected: list[Colour]) -> None:
    assert _rgb(_pixels(mode, data, len(expected))) == expected


def test_bilevel() -> None:
    assert _rgb(_pixels("1", b"\x40", 2)) == [(0, 0, 0), WHITE]


def test_lab() -> None:
    if not features.check("littlecms2"):
        pytest.skip("this Pillow has no littlecms")
    # L 255 and 0 with a and b zero (signed bytes) are white and black.
    np.testing.assert_allclose(_rgb(_pixels("LAB", bytes([255, 0, 0, 0, 0, 0]), 2)), [WHITE, (0, 0, 0)], atol=1)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bit_grey_is_scaled(mode: str) -> None:
    # 257 levels of 65536 make one of 256: 128 / 257 = 0.498, 129 / 257 = 0.502, 32768 / 257 = 127.502.
    levels = [0, 128, 129, 257, 32768, 65535]
    data = struct.pack(f"{'>' if mode == 'I;16B' else '<'}6H", *levels)
    assert [red for red, _, _ in _rgb(_pixels(mode, data, 6))] == [0, 0, 1, 1, 128, 255]


def test_thirty_two_bit_grey_has_the_sixteen_bit_range() -> None:
    image = Image.fromarray(np.array([[0, 129, 65535]], np.int32))
    assert image.mode == "I"
    assert _rgb(image) == [(0, 0, 0), (1, 1, 1), WHITE]


@pytest.mark.parametrize("value", [-1, 65536])
def test_thirty_two_bit_grey_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ImageError, match=re.escape(str(value)) + r".*0\.\.65535"):
        open_image(Image.fromarray(np.array([[5, value]], np.int32)))


def test_float_images_have_the_eight_bit_range() -> None:
    image = Image.fromarray(np.array([[0, 0.4, 0.6, 254.6, 255]], np.float32))
    assert image.mode == "F"
    assert [red for red, _, _ in _rgb(image)] == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("value", [-0.1, 255.5, np.nan, np.inf])
def test_float_images_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(ImageError, match=r"mode F.*0\.\.255"):
        open_image(Image.fromarray(np.array([[5, value]], np.float32)))


def test_a_float_image_on_the_wrong_scale_is_said() -> None:
    with pytest.warns(ImageNotice, match=r"0\.\.1"):
        open_image(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _rgb(Image.fromarray(np.zeros((1, 1), np.float32))) == [(0, 0, 0)]


def _palette(transparency: int | bytes | None) -> Image.Image:
    image = _pixels("P", bytes([0, 1, 2]), 3)
    image.putpalette([10, 20, 30, 200, 0, 255, 1, 2, 3])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (None, [(10, 20, 30), (200, 0, 255), (1, 2, 3)]),
        (0, [WHITE, (200, 0, 255), (1, 2, 3)]),
        (b"\x00\x33", [WHITE, (244, 204, 255), (1, 2, 3)]),
        (b"\xff\x33\x00", [(10, 20, 30), (244, 204, 255), WHITE]),
    ],
)
def test_palette(transparency: int | bytes | None, expected: list[Colour]) -> None:
    assert _rgb(_palette(transparency)) == expected


def test_palette_with_alpha_of_its_own() -> None:
    image = _pixels("P", bytes([0, 1]), 2)
    image.putpalette([10, 20, 30, 0, 200, 0, 255, 51], "RGBA")
    assert _rgb(image) == [WHITE, (244, 204, 255)]


def test_palette_with_an_alpha_band() -> None:
    image = _pixels("PA", bytes([0, 0, 1, 51]), 2)
    image.putpalette([10, 20, 30, 200, 0, 255])
    assert _rgb(image) == [WHITE, (244, 204, 255)]


@pytest.mark.parametrize(
    ("mode", "data", "key", "expected"),
    [
        ("L", bytes([7, 8]), 7, [WHITE, (8, 8, 8)]),
        ("1", b"\x40", 0, [WHITE, WHITE]),
        ("1", b"\x40", 1, [(0, 0, 0), WHITE]),
        ("RGB", bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [WHITE, (1, 2, 4)]),
        ("RGB", bytes([1, 2, 3, 1, 2, 4]), (0x0180, 0x0290, 0x03A0), [WHITE, (1, 2, 4)]),
        ("I;16", struct.pack("<2H", 300, 301), 300, [WHITE, (1, 1, 1)]),
    ],
)
def test_one_transparent_colour(mode: str, data: bytes, key: Any, expected: list[Colour]) -> None:
    image = _pixels(mode, data, 2)
    image.info["transparency"] = key
    assert _rgb(image) == expected
    assert image.tobytes() == data


@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_transparent_colour_that_does_not_fit_is_refused() -> None:
    image = Image.new("L", (2, 1))
    image.info["transparency"] = b"\x00\x01"
    with pytest.raises(ImageError, match="transparent colour"):
        open_image(image)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 9]], np.uint8), [(0, 0, 0), (9, 9, 9)]),
        (np.array([[[9]]], np.uint8), [(9, 9, 9)]),
        (np.array([[[100, 128], [9, 0]]], np.uint8), [(177, 177, 177), WHITE]),
        (np.array([[[1, 2, 3]]], np.uint8), [(1, 2, 3)]),
        (np.array([[[200, 0, 255, 51]]], np.uint8), [(244, 204, 255)]),
        (np.array([[[128, 129, 32768]]], np.uint16), [(0, 1, 128)]),
        (np.array([[[128, 129, 32768]]], ">u2"), [(0, 1, 128)]),
        (np.array([[False, True]]), [(0, 0, 0), WHITE]),
        (np.array([[[0, 0.2, 1]]], np.float64), [(0, 51, 255)]),
        (np.array([[0.2, 1]], np.float32), [(51, 51, 51), WHITE]),
        (np.array([[0.25, 1]], np.float16), [(64, 64, 64), WHITE]),  # 63.75
        # 200 / 255 with alpha a fifth
        (np.array([[[200 / 255, 0, 1, 0.2]]], np.float64), [(244, 204, 255)]),
    ],
)
def test_arrays(array: np.ndarray, expected: list[Colour]) -> None:
    assert _rgb(array) == expected


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_the_first_axis_of_an_array_is_its_height(height: int) -> None:
    array = np.arange(height * 5 * 3, dtype=np.uint8).reshape(height, 5, 3)
    image = open_image(array)
    assert image.size == (5, height)
    np.testing.assert_array_equal(np.asarray(image), array)
    assert open_image(Image.fromarray(array)).size == (5, height)


def test_an_array_need_not_be_contiguous_and_stays_as_it_is() -> None:
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    image = open_image(array[::-1, ::2])
    np.testing.assert_array_equal(np.asarray(image), array[::-1, ::2])
    image.putpixel((0, 0), (99, 99, 99))
    np.testing.assert_array_equal(array.ravel(), np.arange(60))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 240, 320), np.uint8), r"uint8 and shape \(3, 240, 320\)"),
        (np.zeros((2, 2, 0), np.uint8), r"\(2, 2, 0\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"\(1, 2, 2, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\).*no pixels"),
        (np.zeros((2, 2), np.int64), r"int64 and shape \(2, 2\)"),
        (np.zeros((2, 2), np.int8), "int8"),
        (np.zeros((2, 2), np.complex64), "complex64"),
        (np.full((2, 2), None), "object"),
        (np.full((2, 2), np.nan), r"float64.*0\.\.1"),
        (np.full((2, 2), 1.01, np.float32), r"float32.*0\.\.1"),
        (np.full((2, 2), -0.01), r"0\.\.1"),
        (np.full((2, 2), 255.0), r"255\.0.*0\.\.1"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=f"^<array> .*{message}"):
        open_image(array)
