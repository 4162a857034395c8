"""Opening pictures: sources, limits, damage, formats."""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from phisight.errors import ImageError
from phisight.images import DEFAULT_MAX_PIXELS, ImageNotice, open_image


def _gradient(width: int = 10, height: int = 10) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 20, x + y], axis=-1).astype(np.uint8))


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG made by hand, for what Pillow does not write; `rows` with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _png_chunk(b"IHDR", header) + b"".join(chunks) + _png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + _png_chunk(b"IEND", b"")


def _heif(image: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    return buffer.getvalue()


def _file(kind: str) -> bytes:
    """The 10 x 10 gradient as a file."""
    image = _gradient()
    if kind == "HEIC":
        return _heif(image)
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "WEBP lossy": {"quality": 100},
        "WEBP alpha": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "JPEG2000": {"irreversible": False},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    if kind == "WEBP alpha":
        image.putalpha(Image.new("L", image.size, 254))
    return _encode(image, kind.split()[0], **options.get(kind, {}))


EXACT = ["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF"]
LOSSY = ["JPEG", "WEBP lossy", "WEBP alpha", "AVIF", "HEIC"]


@pytest.mark.parametrize("kind", EXACT)
def test_lossless_formats_are_exact(kind: str) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(_file(kind))), np.asarray(_gradient()))


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_come_close(kind: str) -> None:
    image = open_image(_file(kind))
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - np.asarray(_gradient())
    assert np.abs(difference).mean() < 8


@pytest.mark.parametrize("kind", EXACT + LOSSY)
def test_the_pixel_limit_holds_for_every_format(kind: str) -> None:
    data = _file(kind)
    assert open_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match=r"<bytes> is 10 x 10 = 100 pixels and the limit is 99.*max_pixels"):
        open_image(data, max_pixels=99)


@pytest.mark.parametrize("kind", EXACT + LOSSY)
def test_pillows_own_limit_plays_no_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _file(kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (10, 10)
    assert Image.MAX_IMAGE_PIXELS == 5
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="limit is 99"):
        open_image(data, max_pixels=99)


def test_a_disposed_gif_is_free_of_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    data = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.warns(ImageNotice) as notices:
        assert open_image(data).getpixel((0, 0)) == (255, 0, 0)
    assert [notice.category for notice in notices] == [ImageNotice]


_VP8X = b"\x10\0\0\0" + (16_383).to_bytes(3, "little") * 2
BOMBS = {
    "PNG": _png(60_000, 60_000, 8, 2, b""),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"\x2c" + bytes(9),
    "WebP": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + _VP8X,
    "WebP lossless": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<IBI", 10, 0x2F, 0xFFFFFFF),
    "WebP lossy": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8 " + struct.pack("<I", 10)
    + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383),
    "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "PPM": b"P6\n60000 60000\n255\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BOMBS))
def test_a_decompression_bomb_is_stopped_by_its_header(kind: str) -> None:
    with pytest.raises(ImageError, match=r"<bytes> is \d{5} x \d{5} = \d+ pixels and the limit is 200000000"):
        open_image(BOMBS[kind])


def test_a_phone_photo_of_200_megapixels_passes_the_limit() -> None:
    assert DEFAULT_MAX_PIXELS >= 16_320 * 12_240
    with pytest.raises(ImageError, match="truncated"):  # past the limit, stopped only by the missing pixels
        open_image(b"P6\n16320 12240\n255\n")


def test_the_limit_covers_arrays_and_pillow_images() -> None:
    with pytest.raises(ImageError, match="<array> is 10 x 20 = 200 pixels and the limit is 199"):
        open_image(np.zeros((20, 10), np.uint8), max_pixels=199)
    with pytest.raises(ImageError, match="limit is 99"):
        open_image(_gradient(), max_pixels=99)
    with pytest.raises(ImageError, match="max_pixels is 0"):
        open_image(_gradient(), max_pixels=0)


def test_a_lazily_opened_pillow_image_is_bounded_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "lazy.png"
    path.write_bytes(_file("PNG"))
    with Image.open(path) as lazy, pytest.raises(ImageError, match=r"lazy\.png is 10 x 10"):
        open_image(lazy, max_pixels=99)
    with Image.open(path) as lazy:
        opened = open_image(lazy)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(_gradient()))
    path.write_bytes(_encode(_gradient(200, 200), "PNG")[:300])
    with Image.open(path) as lazy, pytest.raises(ImageError, match=r"lazy\.png is damaged or truncated"):
        open_image(lazy)


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "bild ä.png"
    path.write_bytes(_file("PNG"))
    for source in (path, str(path)):
        assert open_image(source).size == (10, 10)
    path.unlink()  # nothing holds the file open
    with pytest.raises(ImageError, match=r"bild ä\.png does not exist"):
        open_image(path)
    with pytest.raises(ImageError, match="is a directory"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"cannot be opened|does not exist"):
        open_image("a\0b.png")
    with pytest.raises(ImageError) as caught:
        open_image("data:image/png;base64," + "A" * 10_000)
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="needs file permissions")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(_file("PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match=r"secret\.png cannot be opened: Permission denied"):
        open_image(path)


class _Pipe(io.RawIOBase):
    """A stream that cannot go back."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._rest), 7)
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


@pytest.mark.parametrize("kind", EXACT)
def test_streams_stay_open_and_may_stand_anywhere(kind: str) -> None:
    stream = io.BytesIO(_file(kind))
    stream.seek(0, io.SEEK_END)
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(open_image(stream)), np.asarray(_gradient()))
    assert not stream.closed
    pipe = io.BufferedReader(_Pipe(stream.getvalue()))
    np.testing.assert_array_equal(np.asarray(open_image(pipe)), np.asarray(_gradient()))


def test_streams_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ImageError, match="<stream> gives str and not bytes: open it in binary mode"):
        open_image(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO(_file("PNG"))
    closed.close()
    with pytest.raises(ImageError, match=r"<stream> cannot be read.*closed"):
        open_image(closed)
    with pytest.raises(ImageError, match="<stream> is empty"):
        open_image(io.BytesIO())


@pytest.mark.parametrize("source", [None, 5, ["a.png"]])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=f"cannot be a {type(source).__name__}"):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "WEBP lossy", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_named(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _encode(Image.fromarray(noise), kind.split()[0], **options)
    path = tmp_path / "half.bin"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"half\.bin is damaged or truncated"):
        open_image(path)


def test_files_without_a_picture_are_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("this is text, whatever its name says", encoding="utf-8")
    with pytest.raises(ImageError, match=r"notes\.png is not an image that can be read: it must be JPEG"):
        open_image(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"notes\.png is empty"):
        open_image(path)
    with pytest.raises(ImageError, match="<bytes> is empty"):
        open_image(b"")
    with pytest.raises(ImageError, match="no pixels"):
        open_image(Image.new("RGB", (0, 3)))


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"]),
    cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
)
def test_damaged_bytes_give_a_picture_or_an_image_error(kind: str, cut: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(_file(kind))
    for position, value in changes:
        data[position % len(data)] = value
    try:
        image = open_image(bytes(data[: len(data) - cut % len(data)]), max_pixels=1_000_000)
    except ImageError as error:
        assert "<bytes>" in str(error) and "\n" not in str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK", "I;16"])
def test_a_pillow_image_is_never_changed(mode: str) -> None:
    image = Image.new(mode, (5, 4), 1)
    image.info["transparency"] = (1, 1, 1) if mode == "RGB" else 1
    if mode in ("RGBA", "CMYK"):
        del image.info["transparency"]
    before = (image.tobytes(), image.mode, image.size, dict(image.info))
    opened = open_image(image)
    assert opened is not image
    opened.paste((7, 7, 7), (0, 0, 5, 4))
    assert (image.tobytes(), image.mode, image.size, image.info) == before


def test_an_upright_rgb_image_is_taken_directly() -> None:
    image = _gradient()
    assert open_image(image) is image


def test_sixteen_bit_rgb_keeps_the_high_bytes() -> None:
    row = b"\0" + struct.pack(">6H", 0x0180, 0x02FF, 0xFFFF, 0x0500, 0x0600, 0x0700)
    key = _png_chunk(b"tRNS", struct.pack(">3H", 0x0180, 0x02FF, 0xFFFF))
    assert np.asarray(open_image(_png(2, 1, 16, 2, row))).tolist() == [[[1, 2, 255], [5, 6, 7]]]
    assert np.asarray(open_image(_png(2, 1, 16, 2, row, key))).tolist() == [[[255] * 3, [5, 6, 7]]]


def test_sixteen_bit_grey_png() -> None:
    row = b"\0" + struct.pack(">3H", 300, 32768, 65535)
    key = _png_chunk(b"tRNS", struct.pack(">H", 300))
    assert np.asarray(open_image(_png(3, 1, 16, 0, row)))[0, :, 0].tolist() == [1, 128, 255]
    assert np.asarray(open_image(_png(3, 1, 16, 0, row, key)))[0, :, 0].tolist() == [255, 128, 255]


def test_a_cmyk_jpeg_from_adobe() -> None:
    data = _encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data[:64]
    np.testing.assert_allclose(np.asarray(open_image(data))[8, 8], (0, 255, 255), atol=3)


def test_a_colour_profile_is_ignored_as_in_the_reference() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = _encode(_gradient(), "PNG", icc_profile=profile)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(_gradient()))


def _ftyp(major: bytes, *compatible: bytes) -> bytes:
    brands = b"".join(compatible)
    return struct.pack(">I", 16 + len(brands)) + b"ftyp" + major + bytes(4) + brands + bytes(64)


@pytest.mark.parametrize("header", [_ftyp(b"heic", b"mif1"), _ftyp(b"mif1", b"heic"), _ftyp(b"msf1", b"hevc")])
def test_heic_without_its_extra_names_it(header: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "photo.heic"
    path.write_bytes(header)
    with pytest.raises(ImageError, match=r'photo\.heic is a HEIF image .*pip install "phisight\[heif\]"'):
        open_image(path)


def test_avif_without_a_reader_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r'AVIF.*pip install "phisight\[heif\]"'):
        open_image(_ftyp(b"avif", b"mif1"))


def test_a_video_is_not_taken_for_a_picture() -> None:
    with pytest.raises(ImageError, match="is not an image that can be read"):
        open_image(_ftyp(b"isom", b"mp41"))


def test_a_damaged_heic_is_named() -> None:
    pytest.importorskip("pillow_heif")
    with pytest.raises(ImageError, match="<bytes> is damaged or truncated"):
        open_image(_heif(_gradient(64, 64))[:200])
