"""Importance matrices: both of llama.cpp's forms, damaged files, and the same bytes as llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.backends.llamacpp_library import import_llama_cpp
from phisight.errors import InputError
from phisight.export.calibration.importance import importance_matrix
from phisight.export.calibration.run import Calibration, CalibrationOptions
from phisight.export.calibration.sources import read_calibration
from phisight.export.checkpoint import Checkpoint
from phisight.quant.ggml import GgmlQuantizer
from phisight.quant.imatrix import ImportanceMatrix, SquareSums
from phisight.quant.methods.base import InputStatistics

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> ImportanceMatrix:
    """Of the built-in model, with pictures."""
    checkpoint = Checkpoint.open(DEMO)
    data = read_calibration("demo", DEMO, checkpoint.config, tokens=600)
    calibration = Calibration(checkpoint, data, tmp_path_factory.mktemp("work") / "w", CalibrationOptions())
    calibration.run()
    return importance_matrix(calibration.moments(), data)


def test_there_and_back(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    matrix.write(path)
    assert list(tmp_path.iterdir()) == [path]
    back = ImportanceMatrix.read(path)
    assert (back.datasets, back.chunk_count, back.chunk_size) == (matrix.datasets, matrix.chunk_count, 512)
    assert sorted(back.weights) == sorted(matrix.weights)
    assert len(matrix.weights) == 4 * 4 + 1
    for name, each in matrix.weights.items():
        np.testing.assert_array_equal(back.weights[name].sums, each.sums)
        np.testing.assert_array_equal(back.weights[name].counts, each.counts)
    assert any("pictures" in name for name in back.datasets)
    assert 1 <= matrix.chunk_count <= 3


def test_the_file_is_what_llama_cpp_looks_for(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    """Keys, names, types and dimensions of tools/imatrix/imatrix.cpp, seen by gguf's own reader."""
    matrix.write(tmp_path / "imatrix.gguf")
    file = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert file.fields["general.type"].contents() == "imatrix"
    assert file.fields["imatrix.chunk_size"].contents() == 512
    assert file.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in file.tensors}
    sums, counts = tensors["blk.0.ffn_down.weight.in_sum2"], tensors["blk.0.ffn_down.weight.counts"]
    assert (sums.shape.tolist(), counts.shape.tolist()) == ([512, 1], [1, 1])
    assert {tensor.tensor_type for tensor in file.tensors} == {gguf.GGMLQuantizationType.F32}


def test_weights_of_tokens_are_no_whole_numbers() -> None:
    moment = np.array([1, 2, 3], np.float32)
    made = ImportanceMatrix.of({"blk.0.attn_qkv.weight": InputStatistics(moment, None, 10.3)}, ("a",))
    assert made.weights["blk.0.attn_qkv.weight"].counts.tolist() == [10]
    np.testing.assert_array_equal(made.weights["blk.0.attn_qkv.weight"].importance, moment)


def test_the_old_form(tmp_path: Path) -> None:
    """Written here as save_imatrix_legacy of llama.cpp writes it."""
    values = np.array([2, 4, 6, 8], "<f4")
    entry = struct.pack("<i", 19) + b"blk.0.ffn_up.weight" + struct.pack("<ii", 2, 4) + values.tobytes()
    path = tmp_path / "imatrix.dat"
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 8) + b"wiki.raw")
    found = ImportanceMatrix.read(path)
    assert (found.datasets, found.chunk_count) == (("wiki.raw",), 2)
    assert found.columns("blk.0.ffn_up.weight", 4) == pytest.approx([1, 2, 3, 4])
    assert found.columns("blk.1.ffn_up.weight", 4) is None
    path.write_bytes(struct.pack("<i", 1) + entry)
    assert ImportanceMatrix.read(path).columns("blk.0.ffn_up.weight", 4) == pytest.approx([1, 2, 3, 4])
    for cut in (0, 3, 6, 20, 30, len(entry) - 1):
        path.write_bytes((struct.pack("<i", 1) + entry)[:cut])
        with pytest.raises(InputError, match="cut short"):
            ImportanceMatrix.read(path)


def test_experts_without_input_count_alike() -> None:
    each = SquareSums(np.array([[2, 4], [0, 0]], np.float32), np.array([2, 0], np.float32))
    assert each.importance.tolist() == [1, 2, 1, 1]


def test_files_that_cannot_be_used(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    name = "blk.0.ffn_down.weight"
    with pytest.raises(InputError, match=r"nothing\.gguf cannot be read"):
        ImportanceMatrix.read(tmp_path / "nothing.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "phi3")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="of the type 'model', wanted an importance matrix"):
        ImportanceMatrix.read(tmp_path / "model.gguf")
    for value, words in [(np.nan, f"{name} that are not finite"), (-1, f"negative values of {name}")]:
        sums = np.full((1, 512), value, np.float32)
        ImportanceMatrix({name: SquareSums(sums, np.ones(1, np.float32))}).write(tmp_path / "bad.gguf")
        with pytest.raises(InputError, match=words):
            ImportanceMatrix.read(tmp_path / "bad.gguf")
    with pytest.raises(InputError, match="512 columns for blk.0.ffn_down.weight, the model 17920"):
        matrix.columns(name, 17920)
    with pytest.raises(InputError, match="cannot be written"):
        matrix.write(tmp_path / "missing/imatrix.gguf")


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_the_same_bytes_as_llama_cpps_quantiser(
    preset: str, matrix: ImportanceMatrix, exported_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    matrix.write(tmp_path / "imatrix.gguf")
    read = ImportanceMatrix.read(tmp_path / "imatrix.gguf")
    source = exported_gguf(DEMO, decoder="F32") / "model-f32.gguf"
    _quantize(llama_cpp, source, tmp_path / "with.gguf", preset, read)
    _quantize(llama_cpp, source, tmp_path / "without.gguf", preset, None)
    floats, weighted, plain = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (source, tmp_path / "with.gguf", tmp_path / "without.gguf")
    )
    compared = 0
    for name, tensor in weighted.items():
        importance = read.columns(name, int(tensor.shape[0])) if len(tensor.shape) == 2 else None
        if importance is None:
            continue
        packed = GgmlQuantizer(tensor.tensor_type.name).quantize(floats[name].data, importance)
        assert packed.tobytes() == tensor.data.tobytes(), name
        assert tensor.data.tobytes() != plain[name].data.tobytes(), name
        compared += 1
    assert compared == 17


def _quantize(llama_cpp: Any, source: Path, target: Path, preset: str, matrix: ImportanceMatrix | None) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{preset}"].value
    params.nthread = 1
    kept: list[NDArray[np.float32]] = []
    if matrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(matrix.weights) + 1))()
        for entry, (name, each) in zip(entries, matrix.weights.items(), strict=False):
            kept.append(each.importance)
            entry.name = name.encode()
            entry.data = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = len(kept[-1])
        params.imatrix = entries  # ends with an entry without a name
    import_llama_cpp()  # silences its log
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
