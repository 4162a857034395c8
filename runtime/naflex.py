"""NaFlex preprocessing: an image becomes patches and their grid, to the bit as in the reference.

    image -> target_size -> resize (Pillow's bilinear, uint8) -> patches (num_patches, 768) float32 + grid

Every image is resized; the aspect ratio is kept only up to the rounding of both sides to multiples of 16.
Nothing is padded, neither pixels nor rows of patches.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from phisight.errors import ImageError, InputError
from phisight.images import DEFAULT_MAX_PIXELS, ImageSource, open_image

__all__ = [
    "MAX_PATCHES",
    "MIN_PATCHES",
    "PATCH_SIZE",
    "PATCH_VALUES",
    "Patches",
    "preprocess",
    "resize",
    "target_size",
    "token_count",
]

PATCH_SIZE = 16
"""Side of a patch in pixels."""

PATCH_VALUES = PATCH_SIZE * PATCH_SIZE * 3
"""Values of a patch: row-major, channel last."""

MAX_PATCHES = 3600
MIN_PATCHES = 256
"""Limits of the patch budget in the released `preprocessor_config.json`."""

# SigLIP2's search stops when the scale is known to this precision; its limits decide the exact sizes.
_SCALE_PRECISION = 1e-5
_MIN_SCALE = _SCALE_PRECISION / 10
_MAX_SCALE = 100.0


@dataclass(frozen=True, eq=False)
class Patches:
    """What the vision encoder reads of one image.

    pixel_values: (num_patches, 768) float32, values in [-1, 1]; patches row-major over the grid, each patch
        16 x 16 x 3 flattened with the channel last. Held as a read-only view, so that `digest` stays true.
    grid: (rows, cols) in patches.
    original_size: (width, height) in pixels of the upright image before the resize.

    Raises ImageError when shapes, dtype or layout do not fit.
    """

    pixel_values: NDArray[np.float32]
    grid: tuple[int, int]
    original_size: tuple[int, int]

    def __post_init__(self) -> None:
        rows, cols = self.grid
        width, height = self.original_size
        if rows < 1 or cols < 1:
            raise ImageError(f"the patch grid is {rows} x {cols}: both numbers must be at least 1")
        if width < 1 or height < 1:
            raise ImageError(f"the original size is {width} x {height}: both numbers must be at least 1")
        values = self.pixel_values
        if values.dtype != np.float32 or values.shape != (rows * cols, PATCH_VALUES):
            raise ImageError(
                f"pixel_values are {values.dtype} of shape {values.shape}: a grid of {rows} x {cols} patches "
                f"needs float32 of shape ({rows * cols}, {PATCH_VALUES})"
            )
        if not values.flags.c_contiguous:
            raise ImageError("pixel_values are not C-contiguous: pass numpy.ascontiguousarray(pixel_values)")
        view = values.view()
        view.flags.writeable = False
        object.__setattr__(self, "pixel_values", view)

    @property
    def num_patches(self) -> int:
        """Number of patches, which is the number of image tokens."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def digest(self) -> bytes:
        """sha256 over grid and pixel values, 32 bytes: equal digests mean equal image features."""
        state = hashlib.sha256(np.array(self.grid, dtype="<i8").tobytes())
        state.update(self.pixel_values.data)
        return state.digest()


def target_size(
    width: int, height: int, max_patches: int = MAX_PATCHES, min_patches: int = MIN_PATCHES
) -> tuple[int, int]:
    """(width, height) in pixels to which an image of this size is resized.

    The budget is the number of whole patches in the image, limited to [min_patches, max_patches]. Both
    sides are scaled alike and rounded up to multiples of 16; the scale is the largest whose patches fit the
    budget, found by SigLIP2's binary search in double precision. It is at most 100, so that tiny images may
    stay under the budget.

    Raises InputError for limits that are not 1 <= min_patches <= max_patches, ImageError for a size without
    pixels or one so long and narrow that no scale fits the budget.
    """
    if not 1 <= min_patches <= max_patches:
        raise InputError(
            f"min_patches is {min_patches} and max_patches is {max_patches}: "
            "they must satisfy 1 <= min_patches <= max_patches"
        )
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels: both sides must be at least 1")
    whole_patches = (width // PATCH_SIZE) * (height // PATCH_SIZE)
    budget = min(max(whole_patches, min_patches), max_patches)

    def grid_at(scale: float) -> tuple[int, int]:
        return _patches_along(height, scale), _patches_along(width, scale)

    low, high = _MIN_SCALE, _MAX_SCALE
    while high - low >= _SCALE_PRECISION:
        middle = (low + high) / 2
        rows, cols = grid_at(middle)
        if rows * cols <= budget:
            low = middle
        else:
            high = middle
    rows, cols = grid_at(low)
    if rows * cols > budget:  # the lower limit was never tried: only there can the budget still be exceeded
        raise ImageError(
            f"the image is {width} x {height} pixels, too long and narrow for {budget} patches: "
            "crop it or raise max_patches"
        )
    return cols * PATCH_SIZE, rows * PATCH_SIZE


def token_count(width: int, height: int, max_patches: int = MAX_PATCHES, min_patches: int = MIN_PATCHES) -> int:
    """Image tokens, one per patch, that an image of this size costs. Raises as `target_size`."""
    target_width, target_height = target_size(width, height, max_patches, min_patches)
    return (target_width // PATCH_SIZE) * (target_height // PATCH_SIZE)


def resize(
    image: ImageSource,
    max_patches: int = MAX_PATCHES,
    min_patches: int = MIN_PATCHES,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """The picture that the model sees: RGB, upright, stretched to `target_size`.

    Raises as `open_image` and `target_size`.
    """
    return _resize(open_image(image, max_pixels=max_pixels), max_patches, min_patches)


def preprocess(
    image: ImageSource,
    max_patches: int = MAX_PATCHES,
    min_patches: int = MIN_PATCHES,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Patches:
    """Image -> patches. Raises as `open_image` and `target_size`."""
    upright = open_image(image, max_pixels=max_pixels)
    resized = _resize(upright, max_patches, min_patches)
    rows, cols = resized.height // PATCH_SIZE, resized.width // PATCH_SIZE
    pixels = np.asarray(resized).reshape(rows, PATCH_SIZE, cols, PATCH_SIZE * 3)
    patches = pixels.transpose(0, 2, 1, 3)  # (rows, cols, 16, 48)
    # The reference computes (float32(u8 / 255) - 0.5) / 0.5. Halving and doubling are exact in binary, so
    # that u8 / 127.5 - 1 has the same bits for all 256 values; it takes two passes and beats a table.
    values = np.empty(patches.shape, dtype=np.float32)
    np.divide(patches, np.float32(127.5), out=values, dtype=np.float32)
    values -= np.float32(1)
    return Patches(values.reshape(rows * cols, PATCH_VALUES), (rows, cols), upright.size)


def _patches_along(side: int, scale: float) -> int:
    # SigLIP2 rounds up to whole patches.
    return max(math.ceil(side * scale / PATCH_SIZE), 1)


def _resize(upright: Image.Image, max_patches: int, min_patches: int) -> Image.Image:
    size = target_size(upright.width, upright.height, max_patches, min_patches)
    return upright.resize(size, Image.Resampling.BILINEAR)
