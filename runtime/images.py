"""Open a picture: bounded before it is decoded, upright, without alpha, RGB.

    source -> identify -> bound the size -> decode -> RGB on white (pixels.py) -> upright

Nothing here depends on Pillow's global pixel limit: the limit is the caller's, and it is the only one.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from phisight.errors import ImageError
from phisight.pixels import ImageNotice, array_to_image, to_rgb

__all__ = ["DEFAULT_MAX_PIXELS", "ImageNotice", "ImageSource", "open_image"]

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | BinaryIO
"""A path, the bytes of a file, a Pillow image, an array (see `pixels.array_to_image`), or a binary stream."""

DEFAULT_MAX_PIXELS = 200_000_000
"""A 200-megapixel phone photo (16320 x 12240) passes; decoded it takes 800 MB."""

# Pillow's readers that work without an outside program and recognise their files by the first bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
_READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, PPM, HEIC or AVIF"

# Brands of the ftyp box: ISO/IEC 23008-12 (HEIF), AV1 Image File Format 1.1.
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})

# EXIF orientation -> what makes the picture upright (EXIF 2.32, tag 0x0112). 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_HEADER_BYTES = 256
_PILLOW_LIMIT = threading.Lock()


def open_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Any picture -> a decoded image in mode RGB, upright, alpha composited on white.

    A Pillow image is never changed; it is returned itself when it is RGB and upright already. A stream is
    read from its start, whatever its position, and stays open. Of several frames or pages the first is
    taken, with an ImageNotice.

    Raises ImageError, which names the file, "<bytes>", "<stream>", "<array>" or "<image>": when there is
    nothing to read, when it is not a picture, damaged or truncated, when width * height exceeds
    `max_pixels`, or when its values do not fit their type.
    """
    if max_pixels < 1:
        raise ImageError(f"max_pixels is {max_pixels}: it must be at least 1")
    if isinstance(source, Image.Image):
        return _finish(source, str(getattr(source, "filename", "")) or "<image>", max_pixels)
    if isinstance(source, np.ndarray):
        if source.ndim >= 2:
            _bound((source.shape[1], source.shape[0]), "<array>", max_pixels)
        return to_rgb(array_to_image(source, "<array>"), "<array>")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "<bytes>", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _decode_path(Path(source), max_pixels)
    if hasattr(source, "read"):
        return _decode(_from_start(source), "<stream>", max_pixels)
    raise ImageError(
        f"an image cannot be a {type(source).__name__}: "
        "pass a path, bytes, a Pillow image, a numpy array or a binary stream"
    )


def _decode_path(path: Path, max_pixels: int) -> Image.Image:
    name = str(path) if len(str(path)) <= 260 else f"{str(path)[:257]}..."
    try:
        if path.is_dir():  # opening one fails in another way on each system
            raise ImageError(f"{name} is a directory: name an image file")
        with path.open("rb") as stream:
            return _decode(_from_start(stream), name, max_pixels)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist: check the path of the image") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be opened: {reason}") from error


def _from_start(stream: IO[bytes]) -> IO[bytes]:
    """The stream at its start, or its bytes when it is one that cannot go back."""
    try:
        if stream.seekable():
            stream.seek(0)
            return stream
        return io.BytesIO(stream.read())
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ImageError(f"<stream> cannot be read as a binary stream: {error}") from error


def _decode(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    header = stream.read(_HEADER_BYTES)
    if not isinstance(header, bytes):
        raise ImageError(f"{name} gives {type(header).__name__} and not bytes: open it in binary mode")
    if not header:
        raise ImageError(f"{name} is empty: it holds no image")
    stream.seek(0)
    return _finish(_open_lazily(stream, header, name, max_pixels), name, max_pixels)


def _open_lazily(stream: IO[bytes], header: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Reads the file's header only: size and mode are known, no pixel is decoded.

    Goes to Pillow's reader of the format, not through Image.open, which applies Pillow's global pixel limit.
    """
    reader = _reader(header, name)
    declared = _declared_size(header)
    if declared is not None:
        _bound(declared, name, max_pixels)
    with _decoding(name, declared or (1, 1), max_pixels):
        image: ImageFile.ImageFile = reader(stream)
    return image


def _reader(header: bytes, name: str) -> Any:
    """Pillow's or pillow_heif's class that reads files with this header."""
    Image.init()
    brands = _brands(header)
    if brands & _AVIF_BRANDS:
        avif = Image.OPEN.get("AVIF")
        if avif is not None and avif[1] is not None and avif[1](header[:16]) is True:
            return avif[0]
        return _heif_reader(f"{name} is an AVIF image", 'pip install "phisight[heif]" "pillow>=11.3"')
    if brands & _HEIF_BRANDS:
        return _heif_reader(f"{name} is a HEIF image (HEIC)", 'pip install "phisight[heif]"')
    for name_of_format in _FORMATS:
        factory, accepts = Image.OPEN[name_of_format]
        verdict = accepts(header[:16]) if accepts is not None else False
        if isinstance(verdict, str):
            raise ImageError(f"{name} is a {name_of_format} image: {verdict}; install Pillow's own wheel")
        if verdict:
            return factory
    raise ImageError(f"{name} is not an image that can be read: it must be {_READABLE}")


def _heif_reader(what: str, install: str) -> Any:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(f"{what} and no reader for it is installed: {install}") from error
    return pillow_heif.HeifImageFile


def _brands(header: bytes) -> frozenset[bytes]:
    """Major and compatible brands of an ISO media file: size, "ftyp", major, version, compatible..."""
    if header[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(header[:4], "big"), len(header))
    return frozenset({header[8:12], *(header[at : at + 4] for at in range(16, end, 4))})


def _declared_size(header: bytes) -> tuple[int, int] | None:
    """(width, height) of the formats whose readers allocate before they tell the size: GIF and WebP.

    Layouts: GIF89a, logical screen descriptor; RFC 9649 (WebP), chunks VP8X, VP8L and VP8.
    """

    def little(start: int, stop: int) -> int:
        return int.from_bytes(header[start:stop], "little")

    if header.startswith((b"GIF87a", b"GIF89a")):
        return little(6, 8), little(8, 10)
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        chunk = header[12:16]
        if chunk == b"VP8X":
            return little(24, 27) + 1, little(27, 30) + 1
        if chunk == b"VP8L":
            bits = little(21, 25)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 ":
            return little(26, 28) & 0x3FFF, little(28, 30) & 0x3FFF
    return None


def _bound(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width} x {height} = {width * height} pixels and the limit is {max_pixels}: "
            "shrink the image or raise max_pixels"
        )


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """An image, perhaps not yet decoded -> RGB, upright."""
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels: it holds no pixels")
    _bound(image.size, name, max_pixels)
    with _decoding(name, image.size, max_pixels):
        several = _holds_frames(image)
        image.load()
    _bound(image.size, name, max_pixels)  # some readers learn the true size only now
    if several:
        warnings.warn(f"{name} holds several frames: only the first is used", ImageNotice, stacklevel=2)
    turn = _UPRIGHT.get(_orientation(image, name))
    rgb = to_rgb(image, name)
    if turn is not None:
        rgb = rgb.transpose(turn)
    elif several and rgb is image:
        rgb = image.copy()  # without the other frames: opened again, it gives no second notice
    if rgb is not image:
        rgb.info.clear()  # orientation and transparency are dealt with
    return rgb


def _holds_frames(image: Image.Image) -> bool:
    # The further pictures of an MPO file, a phone's JPEG, are previews and depth maps, not frames. A Pillow
    # image that stands on a later frame was put there by its owner.
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO" and image.tell() == 0


def _orientation(image: Image.Image, name: str) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow's parser fails in many ways on damaged EXIF; the pixels are sound
        warnings.warn(
            f"{name} has EXIF data that cannot be read ({error}): it is taken to be upright",
            ImageNotice,
            stacklevel=2,
        )
        return 1
    return value if isinstance(value, int) else 1


@contextmanager
def _decoding(name: str, size: tuple[int, int], max_pixels: int) -> Iterator[None]:
    """Whatever a decoder raises becomes an ImageError, and Pillow's pixel limit gives way to ours."""
    try:
        with _pillow_limit(size[0] * size[1], max_pixels):
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} declares a frame over the limit of {max_pixels} pixels: {error}") from error
    except Exception as error:  # decoders raise anything on damaged data, even struct.error and SyntaxError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} is damaged or truncated and cannot be decoded ({reason}): get a fresh copy of it"
        ) from error


@contextmanager
def _pillow_limit(pixels: int, max_pixels: int) -> Iterator[None]:
    # Some of Pillow's readers check its one global limit themselves while they decode. Only a picture over
    # that limit, and within ours, needs the global changed; one at a time, so that the old value comes
    # back.
    with _PILLOW_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        if before is not None and pixels > before:
            Image.MAX_IMAGE_PIXELS = max_pixels
            try:
                yield
            finally:
                Image.MAX_IMAGE_PIXELS = before
            return
    yield
