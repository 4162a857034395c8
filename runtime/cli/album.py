"""A folder of pictures that `phisight demo` draws: PNG files, which take the place of no file of anybody else's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin

from phisight.errors import InputError
from phisight.tasks.question import Box

__all__ = ["Album", "with_box"]

KEYWORD, MARK = "Software", "phisight demo"
"""A text chunk in every file: one that has it was written here, and may be replaced."""
OUTLINE = (255, 0, 128)


class Album:
    """Pictures by name in one folder, which is made with the first of them. All methods raise InputError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, names: Iterable[str]) -> None:
        """That pictures can be saved under these names without a loss."""
        with self._reached():
            if self._folder.exists() and not self._folder.is_dir():
                raise InputError(f"{self._folder} is no folder: give another one with --out")
            for path in map(self._path, names):
                if path.exists() and not _is_ours(path):
                    raise InputError(
                        f"{path} exists and is no picture of phisight demo: move it away, or give another folder "
                        "with --out"
                    )

    def save(self, name: str, pixels: NDArray[np.uint8]) -> Path:
        """Write a picture (height, width, 3) under its name; returns the file."""
        self.check([name])
        path = self._path(name)
        partial = path.with_name(f".{path.name}.partial")
        mark = PngImagePlugin.PngInfo()
        mark.add_text(KEYWORD, MARK)
        with self._reached():
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                Image.fromarray(pixels).save(partial, format="PNG", pnginfo=mark)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def remove(self, name: str) -> None:
        """Take away what an earlier demo saved under a name."""
        self.check([name])
        with self._reached():
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.png"

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"pictures cannot be saved in {self._folder} ({reason}): give another folder with --out"
            ) from None


def with_box(pixels: NDArray[np.uint8], box: Box, width: int = 2) -> NDArray[np.uint8]:
    """A copy of a picture (height, width, 3) with the outline, `width` pixels wide, of a box in shares of its sides.

    A box that is turned inside out or leaves the picture is drawn as far as it can be.
    """
    image = Image.fromarray(pixels)
    (x1, x2), (y1, y2) = (
        sorted(min(max(round(share * side), 0), side - 1) for share in pair)
        for pair, side in ((box[0::2], image.width), (box[1::2], image.height))
    )
    ImageDraw.Draw(image).rectangle((x1, y1, x2, y2), outline=OUTLINE, width=width)
    return np.asarray(image)


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get(KEYWORD) == MARK
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as Pillow meets what is no picture
        return False
