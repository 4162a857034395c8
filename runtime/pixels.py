"""Pixels of every kind become 8-bit RGB: Pillow's modes and numpy arrays.

What decides a value, in one place:

    alpha, of whatever form         composited on white, rounded to the nearest
    16 bits (I;16, I, uint16)       value * 255 / 65535, rounded to the nearest
    32-bit float image (F)          0..255, Pillow's own scale, rounded to the nearest
    float array                     0..1 -> value * 255, rounded to the nearest
    bool array                      False is black, True is white
    1, L, P, CMYK, YCbCr, HSV, LAB  Pillow's conversion; colour profiles are ignored, as in the reference

16-bit RGB files come from Pillow as the high byte of each value, which is also what the reference sees. A
value outside its range is an error, never clipped.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from phisight.errors import ImageError

__all__ = ["ImageNotice", "array_to_image", "to_rgb"]

_WHITE = (255, 255, 255)


class ImageNotice(UserWarning):
    """Something about a picture that its owner should know: what was left out or assumed."""


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A loaded image in any of Pillow's modes -> mode RGB; the image itself when there is nothing to do.

    Raises ImageError for values outside the range of the mode and for a mode that cannot be converted.
    """
    mode = image.mode
    if mode in ("RGBa", "La"):
        return _premultiplied_on_white(image)
    if mode in ("LA", "PA", "RGBA") or (mode == "P" and image.has_transparency_data):
        return _on_white(image if mode == "RGBA" else image.convert("RGBA"))
    if mode == "I" or mode.startswith("I;16"):
        levels = np.asarray(image)
        _reject_outside(levels, 0, 65535, f"{name} (mode {mode})")
        rgb = Image.fromarray(_16_to_8_bits(levels)).convert("RGB")
    elif mode == "F":
        rgb = Image.fromarray(_float_levels(np.asarray(image), name)).convert("RGB")
    elif mode == "RGB":
        rgb = image
    else:
        try:
            rgb = image.convert("RGB")
        except (ImportError, OSError, ValueError) as error:
            raise ImageError(
                f"{name} has mode {mode}, which Pillow cannot convert to RGB ({error}): convert it first"
            ) from error
    if "transparency" in image.info:
        return _colour_key_on_white(image, rgb, name)
    return rgb


def array_to_image(array: NDArray[Any], name: str) -> Image.Image:
    """Array -> image of mode L, LA, RGB or RGBA, 8 bits; axes are always height, width, channels.

    Shapes: (h, w) and (h, w, 1) grey, (h, w, 2) grey and alpha, (h, w, 3) RGB, (h, w, 4) RGB and alpha (not
    premultiplied). dtypes: uint8, uint16 (0..65535), bool, any float (0..1).

    Raises ImageError for another shape or dtype, and for values that are not finite or not within 0..1.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ImageError(
            f"{name} has dtype {array.dtype} and shape {array.shape}: "
            "an image array is (height, width) or (height, width, channels) with 1 to 4 channels"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}: it holds no pixels")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(_array_levels(array, name))


def _array_levels(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either byte order
        return _16_to_8_bits(array)
    if array.dtype.kind == "f":
        _reject_outside(array, 0, 1, f"{name} (dtype {array.dtype})")
        scaled = np.multiply(array, 255, dtype=np.result_type(array.dtype, np.float32))
        levels: NDArray[np.uint8] = np.rint(scaled, out=scaled).astype(np.uint8)
        return levels
    raise ImageError(
        f"{name} has dtype {array.dtype} and shape {array.shape}: "
        "an image array is uint8, uint16, bool, or float in 0..1"
    )


def _16_to_8_bits(levels: NDArray[Any]) -> NDArray[np.uint8]:
    # 65535 / 255 is 257, an odd number: no value lies half-way between two results.
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _float_levels(levels: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    _reject_outside(levels, 0, 255, f"{name} (mode F)")
    if 0 < levels.max() <= 1:
        warnings.warn(
            f"{name} is a float image with values in 0..1, read on the scale 0..255 and so nearly black: "
            "pass a float numpy array for the scale 0..1",
            ImageNotice,
            stacklevel=2,
        )
    return np.rint(levels).astype(np.uint8)


def _reject_outside(values: NDArray[Any], low: int, high: int, what: str) -> None:
    smallest, largest = values.min(), values.max()  # NaN comes through both
    if not (smallest >= low and largest <= high):
        raise ImageError(f"{what} holds values from {smallest} to {largest}: they must be in {low}..{high}")


def _on_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGB", rgba.size, _WHITE)
    white.paste(rgba, mask=rgba)
    return white


def _premultiplied_on_white(image: Image.Image) -> Image.Image:
    bands = np.asarray(image)  # (h, w, 2 or 4) uint8
    colour, alpha = bands[:, :, :-1], bands[:, :, -1:]
    room = 255 - alpha  # what white adds; colour <= alpha in well-formed data
    return Image.fromarray(np.broadcast_to(np.minimum(colour, alpha) + room, (*bands.shape[:2], 3)))


def _colour_key_on_white(image: Image.Image, rgb: Image.Image, name: str) -> Image.Image:
    """PNG's tRNS for pictures without alpha or palette: one grey or one colour is fully transparent."""
    key = image.info["transparency"]
    levels = np.asarray(image)
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        if max(key) > 255:  # a 16-bit file, of which Pillow kept the high bytes
            key = tuple(value >> 8 for value in key)
        transparent = (levels == np.array(key)).all(axis=2)
    elif image.mode == "1" and isinstance(key, int):
        transparent = levels == bool(key)
    elif levels.ndim == 2 and isinstance(key, int):
        transparent = levels == key
    else:
        raise ImageError(
            f"{name} has mode {image.mode} and the transparent colour {key!r}, which does not fit it: "
            "convert it to RGBA first"
        )
    keyed = rgb.copy() if rgb is image else rgb
    keyed.paste(_WHITE, mask=Image.fromarray(transparent))
    return keyed
