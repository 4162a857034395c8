"""Reading GGUF headers: what gguf-py writes comes back; whatever is damaged gives one clear error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phisight.errors import ModelDirError
from phisight.gguf_file import TENSOR_TYPES, GgufFile


def write(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> Path:
    """A small file with a value of every kind and tensors of several types."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_float32("a.f32", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_array("a.strings", ["", "é", "Ġthe"])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 0.25])
    writer.add_array("a.bools", [True, False])
    change(writer)
    writer.add_tensor("half", np.ones((2, 3, 5), np.float16))
    writer.add_tensor(
        "blocks", np.arange(4 * 36, dtype=np.uint8).reshape(4, 36), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def test_metadata(tmp_path: Path) -> None:
    header = GgufFile.read(write(tmp_path / "f.gguf"))
    metadata = header.metadata
    scalars = {key: value for key, value in metadata.items() if not isinstance(value, list | np.ndarray)}
    assert scalars == {
        "general.architecture": "phi3",
        "a.u8": 200,
        "a.i8": -3,
        "a.u16": 60000,
        "a.i16": -300,
        "a.u32": 2**32 - 1,
        "a.i32": -(2**31),
        "a.f32": float(np.float32(0.1)),
        "a.bool": True,
        "a.u64": 2**63,
        "a.i64": -(2**40),
        "a.f64": 0.1,
    }
    assert {type(scalars[key]) for key in ("a.u8", "a.i64")} == {int}
    assert (type(scalars["a.bool"]), type(scalars["a.f32"])) == (bool, float)
    assert header.widths == {
        f"a.{name}": width
        for name, width in zip(
            ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "u64", "i64", "f64"),
            ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"),
            strict=True,
        )
    }
    assert metadata["a.strings"] == ["", "é", "Ġthe"]
    for key, wanted in (("a.integers", [1, -2, 3]), ("a.floats", [0.5, 0.25]), ("a.bools", [True, False])):
        np.testing.assert_array_equal(metadata[key], wanted)


def test_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    tensors = GgufFile.read(path).tensors
    assert [(t.name, t.shape, t.type_name, t.bytes, t.size) for t in tensors.values()] == [
        ("half", (2, 3, 5), "F16", 60, 30),
        ("blocks", (4, 64), "Q4_0", 144, 256),
        ("vector", (7,), "F32", 28, 7),
    ]
    data = path.read_bytes()
    blocks, vector = tensors["blocks"], tensors["vector"]
    assert data[blocks.offset : blocks.offset + blocks.bytes] == bytes(range(144))
    assert data[vector.offset : vector.offset + vector.bytes] == np.arange(7, dtype="<f4").tobytes()


def test_alignment_is_the_files_own(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_custom_alignment(256))
    vector = GgufFile.read(path).tensors["vector"]
    assert vector.offset % 256 == 0
    assert path.read_bytes()[vector.offset :][:28] == np.arange(7, dtype="<f4").tobytes()


def test_types_are_those_of_ggml() -> None:
    known = {int(type_): (type_.name, *sizes) for type_, sizes in gguf.GGML_QUANT_SIZES.items()}
    del known[gguf.GGMLQuantizationType.Q8_1], known[gguf.GGMLQuantizationType.Q8_K]  # never in files
    ours = {number: (type_.name, type_.block_size, type_.block_bytes) for number, type_ in TENSOR_TYPES.items()}
    assert len(known) >= 30
    assert known.items() <= ours.items()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def value_of(key: str, data: bytes) -> int:
    """Where the value of a key begins: behind the key and its type."""
    assert data.count(key.encode()) == 1
    return data.index(key.encode()) + len(key) + 4


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    piece = struct.pack(form, value)
    return data[:at] + piece + data[at + len(piece) :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "does not begin with GGUF"),
    "another format": (lambda d: b"PK\x03\x04" + d[4:], "does not begin with GGUF"),
    "an old version": (lambda d: put(d, 4, "<I", 1), "GGUF version 1"),
    "big-endian": (lambda d: put(d, 4, ">I", 3), "big-endian"),
    "cut in the counts": (lambda d: d[:13], "cut short"),
    "cut in the metadata": (lambda d: d[:200], "cut short"),
    "cut in the tensors": (lambda d: d[: d.index(b"blocks") + 9], "cut short"),
    "cut in the data": (lambda d: d[:-5], "tensor vector ends at byte"),
    "2^60 tensors": (lambda d: put(d, 8, "<Q", 2**60), "declares 1152921504606846976 tensors"),
    "2^64 - 1 keys": (lambda d: put(d, 16, "<Q", 2**64 - 1), "declares 18446744073709551615 metadata keys"),
    "one key too many": (lambda d: put(d, 16, "<Q", 17), "damaged"),
    "a string of 2^62 bytes": (lambda d: put(d, 24, "<Q", 2**62), "would end at byte"),
    "a string that is not UTF-8": (lambda d: replaced(d, "Ġthe".encode(), b"\xff\xfethe"), "a.strings is not UTF-8"),
    "an array of 2^61 strings": (lambda d: put(d, value_of("a.strings", d) + 4, "<Q", 2**61), "strings in a.strings"),
    "an array of 2^40 numbers": (lambda d: put(d, value_of("a.floats", d) + 4, "<Q", 2**40), "values in a.floats"),
    "an array of arrays": (lambda d: put(d, value_of("a.floats", d), "<I", 9), "a.floats is of type 9"),
    "a value of no type": (lambda d: put(d, value_of("a.u64", d) - 4, "<I", 13), "a.u64 is of type 13"),
    "a key twice": (lambda d: replaced(d, b"a.i64", b"a.u64"), "'a.u64', wanted a name that comes once"),
    "a key of two lines": (
        lambda d: put(replaced(d, b"a.u64", b"a\nu64"), value_of("a.u64", d) - 4, "<I", 99),
        "a?u64",
    ),
    "a tensor twice": (lambda d: replaced(d, b"vector", b"blocks"), "tensor blocks is there twice"),
    "a tensor of no dimension": (lambda d: put(d, d.index(b"vector") + 6, "<I", 0), "has 0 dimensions"),
    "a tensor of 5 dimensions": (lambda d: put(d, d.index(b"vector") + 6, "<I", 5), "has 5 dimensions"),
    "a tensor without weights": (lambda d: put(d, d.index(b"vector") + 10, "<Q", 0), "has the shape [0]"),
    "a tensor of 2^63 weights": (lambda d: put(d, d.index(b"vector") + 10, "<Q", 2**63), "has the shape"),
    "a tensor larger than the file": (lambda d: put(d, d.index(b"vector") + 10, "<Q", 2**40), "the file at"),
    "rows that are no whole blocks": (lambda d: put(d, d.index(b"blocks") + 10, "<Q", 33), "rows of 33"),
    "a tensor type of the future": (lambda d: put(d, d.index(b"vector") + 18, "<I", 999), "ggml type 999"),
    "a type that ggml gave up": (lambda d: put(d, d.index(b"vector") + 18, "<I", 4), "ggml type 4"),
    "an offset between the steps": (lambda d: put(d, d.index(b"vector") + 22, "<Q", 33), "offset 33"),
    "two tensors in one place": (lambda d: put(d, d.index(b"vector") + 22, "<Q", 64), "inside another one"),
    "an offset of 2^63": (lambda d: put(d, d.index(b"vector") + 22, "<Q", 2**63), "the file at"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(whole: bytes, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(whole))
    with pytest.raises(ModelDirError) as caught:
        GgufFile.read(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text


def test_alignment_that_is_no_power_of_two(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_uint32("general.alignment", 48))
    with pytest.raises(ModelDirError, match="general.alignment is 48"):
        GgufFile.read(path)


def test_a_part_of_a_split_model(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelDirError, match="part of a model in 3 files"):
        GgufFile.read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelDirError, match="cannot be read"):
            GgufFile.read(path)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_damage_gives_a_header_or_the_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, cut out and put in, mostly in the header."""
    damaged = bytearray(whole)
    end = whole.index(b"vector") + 40
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(end, len(damaged))))
        piece = data.draw(st.binary(max_size=9) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]))
        gone = data.draw(st.sampled_from([len(piece), 0, 1, 40]))
        damaged[at : at + gone] = piece
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(damaged)
    try:
        header = GgufFile.read(path)
    except ModelDirError as error:
        assert str(error).isprintable()
    else:
        assert all(tensor.offset + tensor.bytes <= len(damaged) for tensor in header.tensors.values())
