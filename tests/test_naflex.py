"""NaFlex preprocessing against the reference, to the bit, and the properties of its sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phisight.errors import ImageError, InputError
from phisight.images import open_image
from phisight.naflex import Patches, preprocess, resize, target_size, token_count

Synthetic = Callable[[str, int, int, int], Image.Image]

# Pillow's conversions of these differ between versions: compared only where the RGB input agrees.
_VARYING = ("CMYK", "YCbCr", "I;16", "I", "F")


def _sha256(image: Image.Image) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def _cases(golden: Path) -> list[dict[str, Any]]:
    text = (golden / "images/naflex_golden.json").read_text(encoding="utf-8")
    cases: list[dict[str, Any]] = json.loads(text)
    return cases


def _case_image(case: dict[str, Any], golden: Path, synthetic_image: Synthetic) -> Image.Image:
    """What the reference was given: RGB, with alpha dropped and no orientation applied."""
    if case["kind"] == "file":
        image: Image.Image = Image.open(golden / "images" / case["file"])
    else:
        image = synthetic_image(case["mode"], case["width"], case["height"], case["seed"])
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def test_all_golden_images_are_exact(golden: Path, synthetic_image: Synthetic) -> None:
    edges = np.load(golden / "images/patches_first_last.npz")
    compared = 0
    for case in _cases(golden):
        if "kind" not in case or case["height"] in (1, 3):  # these the reference fails on or scrambles
            continue
        name = case["name"]
        image = _case_image(case, golden, synthetic_image)
        if _sha256(image) != case["rgb_in_sha256"]:
            assert case["mode"] in _VARYING or name.endswith(".jpg"), f"{name}: the input differs"
            continue
        patches = preprocess(image)
        assert patches.grid == tuple(case["spatial_shapes"]), name
        assert patches.num_patches == case["num_patches"], name
        assert patches.original_size == (case["width"], case["height"]), name
        assert _sha256(resize(image)) == case["resized_sha256"], name
        assert hashlib.sha256(patches.pixel_values.tobytes()).hexdigest() == case["pv_sha256"], name
        np.testing.assert_array_equal(patches.pixel_values[0], edges[f"{name}/first"], name)
        np.testing.assert_array_equal(patches.pixel_values[-1], edges[f"{name}/last"], name)
        compared += 1
    assert compared >= 45


def test_whole_arrays_are_exact(golden: Path, synthetic_image: Synthetic) -> None:
    cases = {case["name"]: case for case in _cases(golden)}
    for name, values in np.load(golden / "images/pixel_values_full.npz").items():
        image = _case_image(cases[name], golden, synthetic_image)
        np.testing.assert_array_equal(preprocess(image).pixel_values, values, name)
    for name, pixels in np.load(golden / "images/resized_u8.npz").items():
        image = _case_image(cases[name], golden, synthetic_image)
        if _sha256(image) == cases[name]["rgb_in_sha256"] or cases[name]["mode"] not in _VARYING:
            np.testing.assert_array_equal(np.asarray(resize(image)), pixels, name)


def test_every_pixel_value_is_exact(golden: Path) -> None:
    # 256 x 256 keeps its size: column x holds the value x.
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 256, 3))
    values = preprocess(ramp).pixel_values.reshape(16, 16, 16, 16, 3)
    expected = np.load(golden / "images/patches_first_last.npz")["lut_u8_to_f32"]
    np.testing.assert_array_equal(values[0, :, 0, :, 0].ravel(), expected)


def test_a_photo_on_its_side_is_sized_upright(golden: Path) -> None:
    cases = {case["name"]: case for case in _cases(golden)}
    path = golden / "images/exif6_300x200.jpg"
    if _sha256(Image.open(path)) != cases["file_exif6_300x200.jpg"]["decoded_sha256"]:
        pytest.skip("this JPEG decoder gives other pixels than the reference's")
    expected = cases["exif_via_path"]
    patches = preprocess(path)
    assert patches.original_size == (200, 300)
    assert patches.grid == tuple(expected["spatial_shapes"])
    assert hashlib.sha256(patches.pixel_values.tobytes()).hexdigest() == expected["pv_sha256"]


def test_an_array_gives_what_the_reference_gives(golden: Path, synthetic_image: Synthetic) -> None:
    expected = next(case for case in _cases(golden) if case["name"] == "np_uint8")
    patches = preprocess(np.asarray(synthetic_image("RGB", 320, 240, 0)))
    assert hashlib.sha256(patches.pixel_values.tobytes()).hexdigest() == expected["pv_sha256"]


def test_one_pixel_works_where_the_reference_fails() -> None:
    patches = preprocess(Image.new("RGB", (1, 1), (255, 0, 51)))
    assert patches.grid == (7, 7)  # 100 times larger, rounded up to 112 x 112
    one_pixel = np.array([1, -1, np.float32(0.2) * 2 - 1], dtype=np.float32)
    expected = np.tile(one_pixel, (49 * 256, 1))
    np.testing.assert_allclose(patches.pixel_values.reshape(-1, 3), expected, atol=1e-7)


def test_a_height_of_three_is_not_scrambled(golden: Path, synthetic_image: Synthetic) -> None:
    case = next(case for case in _cases(golden) if case["name"] == "RGB_4000x3")
    image = synthetic_image("RGB", 4000, 3, 0)
    patches = preprocess(image)
    assert patches.original_size == (4000, 3)
    assert patches.grid == (1, 256)
    # The reference takes the rows for channels, which turns the picture into another of 3 x 4000 pixels.
    scrambled = np.asarray(image).transpose(1, 2, 0)
    values = preprocess(scrambled).pixel_values
    assert hashlib.sha256(values.tobytes()).hexdigest() == case["pv_sha256"]


def test_patches_are_row_major_with_the_channel_last() -> None:
    # Each pixel names its place: red its patch, green its row within the patch, blue its column.
    y, x = np.mgrid[0:256, 0:256]
    pixels = np.stack([(y // 16) * 16 + x // 16, y % 16, x % 16], axis=-1).astype(np.uint8)
    values = preprocess(pixels).pixel_values
    back = np.rint((values + 1) * 127.5).astype(np.uint8).reshape(256, 16, 16, 3)
    row, col = np.mgrid[0:16, 0:16]
    for patch in range(256):
        np.testing.assert_array_equal(back[patch], np.stack([np.full_like(row, patch), row, col], axis=-1))


def test_all_golden_sizes_are_exact(golden: Path) -> None:
    table = json.loads((golden / "images/naflex_size_table.json").read_text(encoding="utf-8"))
    assert len(table["rows"]) == 1060
    wrong = [row for row in table["rows"] if target_size(row[0], row[1]) != (row[3], row[2])]
    assert wrong == []


def test_the_price_of_some_sizes() -> None:
    assert token_count(800, 600) == 50 * 37
    assert token_count(17, 31) == 252
    assert token_count(4000, 3000) == 3588  # 69 x 52, the largest 4:3 grid within 3600
    assert target_size(256, 256, max_patches=64, min_patches=64) == (128, 128)


@settings(deadline=None, max_examples=200)
@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    limits=st.tuples(st.integers(1, 4096), st.integers(1, 4096)).map(sorted),
)
def test_sizes_are_whole_patches_within_the_budget(width: int, height: int, limits: list[int]) -> None:
    smallest, largest = limits
    new_width, new_height = target_size(width, height, largest, smallest)
    assert new_width % 16 == 0 and new_height % 16 == 0 and new_width >= 16 and new_height >= 16
    budget = min(max((width // 16) * (height // 16), smallest), largest)
    assert new_width * new_height // 256 <= budget
    assert token_count(width, height, largest, smallest) == new_width * new_height // 256
    assert target_size(height, width, largest, smallest) == (new_height, new_width)


@pytest.mark.parametrize(("largest", "smallest"), [(255, 256), (10, 0), (0, 0), (-1, -2)])
def test_limits_that_make_no_sense_are_refused(largest: int, smallest: int) -> None:
    with pytest.raises(InputError, match=f"min_patches is {smallest} and max_patches is {largest}"):
        target_size(100, 100, largest, smallest)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_a_size_without_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(ImageError, match=f"{width} x {height}"):
        target_size(width, height)


def test_a_size_that_fits_no_budget_is_refused() -> None:
    # At the smallest scale, 1e-6, these are 200 pixels: 13 patches.
    assert target_size(200_000_000, 1, max_patches=13, min_patches=13) == (208, 16)
    with pytest.raises(ImageError, match="12 patches"):
        target_size(200_000_000, 1, max_patches=12, min_patches=12)


@pytest.mark.parametrize(
    ("values", "grid", "size", "message"),
    [
        (np.zeros((6, 768), np.float64), (2, 3), (9, 9), "float64"),
        (np.zeros((5, 768), np.float32), (2, 3), (9, 9), r"\(5, 768\)"),
        (np.zeros((6, 588), np.float32), (2, 3), (9, 9), r"\(6, 588\)"),
        (np.zeros((768, 6), np.float32).T, (2, 3), (9, 9), "ascontiguousarray"),
        (np.zeros((6, 768), np.float32), (-2, -3), (9, 9), "-2 x -3"),
        (np.zeros((6, 768), np.float32), (2, 3), (0, 9), "0 x 9"),
    ],
)
def test_patches_that_do_not_fit_are_refused(
    values: np.ndarray, grid: tuple[int, int], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        Patches(values, grid, size)


def test_the_digest_names_grid_and_pixels() -> None:
    values = np.zeros((6, 768), np.float32)
    digest = Patches(values, (2, 3), (9, 9)).digest
    assert len(digest) == 32
    assert Patches(values.copy(), (2, 3), (50, 40)).digest == digest  # the original size changes no feature
    assert Patches(values, (3, 2), (9, 9)).digest != digest
    changed = values.copy()
    changed[5, 767] = 1
    assert Patches(changed, (2, 3), (9, 9)).digest != digest


def test_patches_cannot_be_changed() -> None:
    patches = preprocess(Image.new("RGB", (40, 40)))
    with pytest.raises(ValueError, match="read-only"):
        patches.pixel_values[0, 0] = 1


def test_the_resized_picture_survives_a_png(tmp_path: Path, synthetic_image: Synthetic) -> None:
    seen = resize(synthetic_image("RGB", 300, 200, 5), max_patches=100, min_patches=50)
    assert seen.mode == "RGB" and seen.width * seen.height <= 100 * 256
    seen.save(tmp_path / "seen.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "seen.png")), np.asarray(seen))


def test_the_pixel_limit_is_passed_on() -> None:
    with pytest.raises(ImageError, match="limit is 99"):
        preprocess(Image.new("RGB", (10, 10)), max_pixels=99)
    with pytest.raises(ImageError, match="limit is 99"):
        resize(Image.new("RGB", (10, 10)), max_pixels=99)
