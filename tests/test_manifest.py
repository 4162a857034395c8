"""phisight.json: what is read, what is checked, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phisight
from phisight.errors import ModelDirError
from phisight.manifest import FileEntry, Manifest, TensorEntry, bits_per_weight, hash_file


@pytest.fixture
def model_copy(tiny_checkpoint: Path, exported: Callable[..., Path], tmp_path: Path) -> Path:
    """An exported model that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(exported(tiny_checkpoint, decoder="int4"), copy)
    return copy


def _edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((directory / "phisight.json").read_text())
    change(data)
    (directory / "phisight.json").write_text(json.dumps(data))


def _error(directory: Path) -> str:
    """Of reading it, which loading it raises too."""
    with pytest.raises(ModelDirError) as caught:
        Manifest.read(directory)
    message = str(caught.value)
    assert "\n" not in message
    with pytest.raises(ModelDirError):
        phisight.load(directory)
    return message


def test_what_is_written_is_read(model_copy: Path) -> None:
    manifest = Manifest.read(model_copy)
    before = (model_copy / "phisight.json").read_bytes()
    manifest.write(model_copy)
    assert (model_copy / "phisight.json").read_bytes() == before
    changed = replace(manifest, model=replace(manifest.model, vision=None, images=None))
    changed.write(model_copy)
    assert Manifest.read(model_copy) == changed


def test_a_missing_file_and_a_wrong_size(model_copy: Path) -> None:
    """All that differ are named, with sizes."""
    (model_copy / "vision.onnx").unlink()
    size = (model_copy / "embeddings.npy").stat().st_size
    with (model_copy / "embeddings.npy").open("ab") as file:
        file.write(b"x")
    error = _error(model_copy)
    assert "vision.onnx is missing" in error
    assert f"embeddings.npy has {size + 1} bytes, wanted {size}" in error


def test_a_directory_in_a_files_place(model_copy: Path) -> None:
    (model_copy / "vision.onnx").unlink()
    (model_copy / "vision.onnx").mkdir()
    assert "vision.onnx is missing" in _error(model_copy)


@pytest.mark.parametrize("name", ["decoder.onnx.data", "tokenizer.json", "vision.onnx"])
def test_wrong_contents_show_when_verified(model_copy: Path, name: str) -> None:
    manifest = Manifest.read(model_copy)
    read: list[int] = []
    manifest.verify(model_copy, read.append)
    assert sum(read) == sum(entry.bytes for entry in manifest.files.values())
    data = bytearray((model_copy / name).read_bytes())
    data[len(data) // 3] ^= 1
    (model_copy / name).write_bytes(data)
    Manifest.read(model_copy)  # the size is right
    with pytest.raises(ModelDirError, match=f"the contents of {name} do not fit"):
        manifest.verify(model_copy)


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert hash_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_newer_schema(model_copy: Path) -> None:
    _edit(model_copy, lambda data: data.update(schema=2, files={"new": "form"}))
    error = _error(model_copy)
    assert "schema 2" in error
    assert "update phisight" in error


@pytest.mark.parametrize("schema", [0, "1", None, -1])
def test_a_schema_that_never_was(model_copy: Path, schema: object) -> None:
    _edit(model_copy, lambda data: data.update(schema=schema))
    assert "not a manifest of schema 1" in _error(model_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not JSON"])
def test_a_manifest_that_is_not_json(model_copy: Path, content: bytes) -> None:
    (model_copy / "phisight.json").write_bytes(content)
    assert "cannot be read as JSON" in _error(model_copy)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"schema": 1}', '{"schema": 1, "model": []}'])
def test_a_manifest_without_its_parts(model_copy: Path, content: str) -> None:
    (model_copy / "phisight.json").write_text(content)
    assert "not a manifest of schema 1" in _error(model_copy)


@pytest.mark.parametrize("key", ["format", "phisight", "model", "options", "files", "tensors", "schema"])
def test_a_manifest_without_one_part(model_copy: Path, key: str) -> None:
    _edit(model_copy, lambda data: data.pop(key))
    assert "not a manifest of schema 1" in _error(model_copy)


@pytest.mark.parametrize("value", [None, 3, [1]])
@pytest.mark.parametrize("key", ["model", "options", "files", "tensors"])
def test_a_part_of_another_kind(model_copy: Path, key: str, value: object) -> None:
    _edit(model_copy, lambda data: data.update({key: value}))
    assert "not a manifest of schema 1" in _error(model_copy)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/file", "..\\secret", "C:secret", "..", ".", "", "C:\\secret"]
)
def test_names_that_lead_out_of_the_directory(model_copy: Path, name: str) -> None:
    (model_copy.parent / "secret").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hash_file(model_copy.parent / "secret")}
    _edit(model_copy, lambda data: data["files"].update({name: entry}))
    assert "leads out of the directory" in _error(model_copy)


def test_what_is_no_model_directory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "it is a checkpoint: export it first" in _error(tiny_checkpoint)
    assert "is a file" in _error(tiny_checkpoint / "config.json")
    assert "is not there" in _error(tmp_path / "none")
    assert "has no phisight.json" in _error(tmp_path)


def test_bits_per_weight() -> None:
    """32 weights in 18 bytes are 4.5 bits, 16 in 64 are 32; together 82 x 8 / 48."""
    tensors = {
        "a": TensorEntry("decoder", "int4 block 32", 32, 18),
        "b": TensorEntry("decoder", "f32", 16, 64),
        "c": TensorEntry("head", "int8 block 32", 32, 34),
    }
    assert bits_per_weight(tensors, "decoder") == 82 * 8 / 48
    assert bits_per_weight(tensors, "head") == 8.5
    assert bits_per_weight(tensors, "decoder", "head") == 116 * 8 / 80
    assert bits_per_weight(tensors, "vision") == 0


def test_entries_of_files(model_copy: Path) -> None:
    files = Manifest.read(model_copy).files
    assert files.keys() == {path.name for path in model_copy.iterdir()} - {"phisight.json"}
    for name, entry in files.items():
        path = model_copy / name
        assert entry == FileEntry(path.stat().st_size, hash_file(path))
