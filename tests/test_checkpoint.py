"""Checkpoint directories: faults found before any weight is read, and weights read exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig
from phisight.errors import CheckpointError, ConfigError
from phisight.export import checkpoint as checkpoint_module
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import expected_tensors

NORM = "model.norm.weight"
QKV = "model.layers.3.self_attn.qkv_proj.weight"
TABLE = "model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

Tensors = dict[str, NDArray[Any]]


@pytest.fixture
def sharded(golden: Path, checkpoint_copy: Path) -> Path:
    (checkpoint_copy / "model.safetensors").unlink()
    for file in (golden / "tiny_model_sharded").iterdir():
        shutil.copyfile(file, checkpoint_copy / file.name)
    return checkpoint_copy


def _edit(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def _error(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def test_both_forms_hold_the_same(tiny_checkpoint: Path, sharded: Path) -> None:
    single, several = Checkpoint.open(tiny_checkpoint), Checkpoint.open(sharded)
    assert len(single.tensors) == 111
    assert single.tensors.keys() == several.tensors.keys()
    for name, tensor in single.tensors.items():
        np.testing.assert_array_equal(tensor.load(), several.tensors[name].load())


def test_values_are_the_files(tiny_checkpoint: Path) -> None:
    raw = load_file(tiny_checkpoint / "model.safetensors")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert raw.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.load(), raw[name])
        assert (tensor.shape, tensor.dtype, tensor.size) == (raw[name].shape, "F32", raw[name].size)


def test_slices_add_up_to_the_whole(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of 352 x 128: at 1000 elements at once, 7 rows or 2 columns a time."""
    monkeypatch.setattr(checkpoint_module, "ELEMENTS_AT_ONCE", 1000)
    tensors = Checkpoint.open(tiny_checkpoint).tensors
    whole = tensors[TABLE].load()
    rows, columns = list(tensors[TABLE].chunks()), list(tensors[TABLE].column_chunks())
    assert [len(part) for part in rows] == [7] * 50 + [2]
    assert [part.shape for part in columns] == [(352, 2)] * 64
    np.testing.assert_array_equal(np.concatenate(rows), whole)
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), whole)
    np.testing.assert_array_equal(tensors[TABLE].rows(100, 103), whole[100:103])
    np.testing.assert_array_equal(np.concatenate(list(tensors[NORM].chunks())), tensors[NORM].load())


def test_half_precision_is_read_exactly(tiny_checkpoint: Path, checkpoint_copy: Path) -> None:
    """Every BF16 value is a float32 whose low half is zero, also subnormal ones; every F16 value a float32."""
    file = checkpoint_copy / "model.safetensors"
    bits = np.arange(128 * 256, dtype=np.uint32).reshape(256, 128)  # all of BF16 that is positive
    finite = (bits << 16).view(np.float32)
    finite[~np.isfinite(finite)] = 0

    def halve(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16 if "norm" in name else ml_dtypes.bfloat16)
        tensors[QKV] = finite.astype(ml_dtypes.bfloat16)

    _edit(file, halve)
    tensors = Checkpoint.open(checkpoint_copy).tensors
    assert (tensors[QKV].dtype, tensors[NORM].dtype) == ("BF16", "F16")
    loaded = tensors[QKV].load()
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded.view(np.uint32), finite.view(np.uint32))
    original = Checkpoint.open(tiny_checkpoint).tensors
    np.testing.assert_array_equal(tensors[NORM].load(), original[NORM].load().astype(np.float16).astype(np.float32))


def test_the_real_models_tensors(golden: Path) -> None:
    config = ModelConfig(
        DecoderConfig(5120, 17920, 40, 40, 10, 100352, 32768, 500000.0, 1e-5),
        VisionConfig(1152, 4304, 27, 16),
        ImageBudget(),
        GenerationDefaults((100265,)),
    )
    wanted = json.loads((golden / "real_expected_tensors.json").read_text())
    specs = expected_tensors(config)
    assert {name: list(spec.shape) for name, spec in specs.items()} == wanted
    assert len(specs) == 695
    assert sum(int(np.prod(spec.shape)) for spec in specs.values()) == 15_119_518_144


def test_unused_tensors_are_named(tiny_checkpoint: Path) -> None:
    """The last vision layer (16 tensors), the norm behind it (2) and the pooling head (11)."""
    unused = Checkpoint.open(tiny_checkpoint).unused
    tower = "model.vision_tower.vision_tower.vision_model."
    counts = [
        sum(name.startswith(tower + part) for name in unused)
        for part in ("encoder.layers.3.", "post_layernorm.", "head.")
    ]
    assert counts == [16, 2, 11]
    assert len(unused) == sum(counts)


def test_a_tied_head_has_the_embeddings_weights(checkpoint_copy: Path) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    (checkpoint_copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "1 tensors are not known to this architecture: lm_head.weight" in _error(checkpoint_copy)
    _edit(checkpoint_copy / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    tensors = Checkpoint.open(checkpoint_copy).tensors
    head, table = tensors["lm_head.weight"], tensors[TABLE]
    assert (head.spec.part, table.spec.part) == ("head", "embeddings")
    np.testing.assert_array_equal(head.load(), table.load())


def test_missing_tensors_are_all_listed(checkpoint_copy: Path) -> None:
    _edit(checkpoint_copy / "model.safetensors", lambda tensors: (tensors.pop(NORM), tensors.pop(QKV)))
    error = _error(checkpoint_copy)
    assert "2 tensors are missing" in error
    assert NORM in error
    assert QKV in error


def test_a_wrong_shape(checkpoint_copy: Path) -> None:
    _edit(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({QKV: tensors[QKV][:-1].copy()}))
    assert f"{QKV} has shape [255, 128], wanted [256, 128]" in _error(checkpoint_copy)


def test_a_wrong_dtype(checkpoint_copy: Path) -> None:
    _edit(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({QKV: tensors[QKV].astype(np.int8)}))
    assert f"{QKV} is I8, wanted BF16, F16, F32" in _error(checkpoint_copy)


def test_unknown_tensors(checkpoint_copy: Path) -> None:
    name = "model.layers.4.input_layernorm.weight"  # a layer more than config.json says
    _edit(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({name: np.ones(128, np.float32)}))
    assert f"1 tensors are not known to this architecture: {name}" in _error(checkpoint_copy)


def test_a_text_only_config_does_not_know_vision_tensors(checkpoint_copy: Path) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    (checkpoint_copy / "config.json").write_text(json.dumps(config | {"architectures": ["Phi3ForCausalLM"]}))
    assert "tensors are not known to this architecture" in _error(checkpoint_copy)


def test_all_faults_in_one_line(checkpoint_copy: Path) -> None:
    def damage(tensors: Tensors) -> None:
        del tensors[NORM]
        tensors[QKV] = tensors[QKV].T.copy()
        tensors[TABLE] = tensors[TABLE].astype(np.float64)
        tensors["lm_head.bias"] = np.zeros(352, np.float32)

    _edit(checkpoint_copy / "model.safetensors", damage)
    error = _error(checkpoint_copy)
    for part in (f"1 tensors are missing: {NORM}", f"{QKV} has shape", f"{TABLE} is F64", "lm_head.bias"):
        assert part in error


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_shard(sharded: Path, shard: str) -> None:
    (sharded / shard).unlink()
    error = _error(sharded)
    listed = [name for name, file in json.loads((sharded / INDEX).read_text())["weight_map"].items() if file == shard]
    assert f"shard {shard} is missing ({len(listed)} tensors)" in error
    assert all(name in error for name in listed)


def test_all_missing_shards_are_named(sharded: Path) -> None:
    for shard in SHARDS:
        (sharded / shard).unlink()
    assert all(f"shard {shard} is missing" in _error(sharded) for shard in SHARDS)


@pytest.mark.parametrize("keep", [0, 4, 1000, 1_900_000])
def test_a_file_cut_short(sharded: Path, keep: int) -> None:
    file = sharded / SHARDS[0]
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{SHARDS[0]} is damaged or cut short" in _error(sharded)


def test_a_single_file_cut_short(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    error = _error(checkpoint_copy)
    assert "model.safetensors is damaged or cut short" in error
    assert "missing" not in error


def test_a_header_that_is_no_header(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "damaged" in _error(checkpoint_copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert "has no weight_map" in _error(sharded)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3])
def test_an_index_that_leads_elsewhere(sharded: Path, file: object) -> None:
    _edit_index(sharded, lambda weights: weights.update({NORM: file}))
    error = _error(sharded)
    assert f"{NORM} lies in {file!r}" in error
    assert "same directory" in error


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    right = index[NORM]
    wrong = next(shard for shard in SHARDS if shard != right)
    _edit_index(sharded, lambda weights: weights.update({NORM: wrong}))
    error = _error(sharded)
    assert f"{wrong} lacks what {INDEX} lists in it: {NORM}" in error
    assert f"{right} holds what {INDEX} does not list in it: {NORM}" in error


def test_a_tensor_that_the_index_leaves_out(sharded: Path) -> None:
    _edit_index(sharded, lambda weights: weights.pop(NORM))
    error = _error(sharded)
    assert f"does not list in it: {NORM}" in error
    assert f"1 tensors are missing: {NORM}" in error


def test_no_weights_at_all(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in _error(checkpoint_copy)


def test_what_is_no_checkpoint_directory(tmp_path: Path) -> None:
    assert "not a directory" in _error(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)
