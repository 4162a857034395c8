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
from phisight.export.convert import export_gguf, plan_gguf
from phisight.export.gguf_plan import GgufOptions
from phisight.export.names import gguf_name
from phisight.export.synth import synthesize
from phisight.manifest import Manifest
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


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q5_0"])
def test_an_export_has_the_same_bytes_as_llama_cpps_quantiser(
    preset: str, matrix: ImportanceMatrix, exported_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    matrix.write(tmp_path / "imatrix.gguf")
    read = ImportanceMatrix.read(tmp_path / "imatrix.gguf")
    ours = _export(DEMO, preset, read, tmp_path / "ours")
    theirs = _quantize(llama_cpp, exported_gguf(DEMO, decoder="F32") / "model-f32.gguf", tmp_path, preset, read)
    plain = _tensors(exported_gguf(DEMO, decoder=preset) / f"model-{preset.lower()}.gguf")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert tensor.data.tobytes() == theirs[name].data.tobytes(), name
        if name in read.weights:
            assert tensor.data.tobytes() != plain[name].data.tobytes(), name
    path = tmp_path / f"ours/model-{preset.lower()}.gguf"
    fields = gguf.GGUFReader(path).fields
    assert fields["quantize.imatrix.entries_count"].contents() == 17
    assert fields["quantize.imatrix.dataset"].contents() == "; ".join(read.datasets)
    assert Manifest.read(path.parent).options["imatrix"] == read.digest


@pytest.mark.parametrize("preset", ["IQ4_NL", "Q5_0"])
def test_types_that_depend_on_there_being_a_matrix(preset: str, tmp_path: Path) -> None:
    """In the first eighth of the layers, which a model of four does not have."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    checkpoint = synthesize(tmp_path / "deep", layers=8, width="tiny")
    rng = np.random.default_rng(0)
    statistics = {
        gguf_name(name): InputStatistics(rng.random(tensor.shape[1], np.float32), None, 10)
        for name, tensor in checkpoint.tensors.items()
        if tensor.spec.part in ("decoder", "head") and len(tensor.shape) == 2
    }
    matrix = ImportanceMatrix.of(statistics, ("random",))
    ours = _export(checkpoint.directory, preset, matrix, tmp_path / "ours")
    floats = GgufOptions(decoder="F32", onnx_vision="none")
    export_gguf(checkpoint, plan_gguf(checkpoint, floats), tmp_path / "floats")
    theirs = _quantize(llama_cpp, tmp_path / "floats/model-f32.gguf", tmp_path, preset, matrix)
    types = ({name: tensor.tensor_type.name for name, tensor in file.items()} for file in (ours, theirs))
    assert next(types) == next(types)
    assert ours["blk.0.ffn_down.weight"].tensor_type.name == {"IQ4_NL": "IQ4_NL", "Q5_0": "Q5_1"}[preset]


def test_matrices_that_do_not_fit_the_export(matrix: ImportanceMatrix) -> None:
    checkpoint = Checkpoint.open(DEMO)
    for decoder in ("Q4_0", "Q8_0", "F16"):
        with pytest.raises(InputError, match=f"no use for {decoder.lower()}"):
            GgufOptions(decoder=decoder, imatrix=matrix)
    other = ImportanceMatrix({"blk.0.ffn_gate.weight": SquareSums(np.ones((1, 4), np.float32), np.ones(1, np.float32))})
    with pytest.raises(InputError, match="names no weight of this model"):
        plan_gguf(checkpoint, GgufOptions(decoder="Q4_K_M", imatrix=other))
    small = ImportanceMatrix({"blk.0.ffn_up.weight": SquareSums(np.ones((1, 4), np.float32), np.ones(1, np.float32))})
    with pytest.raises(InputError, match=r"4 columns for blk\.0\.ffn_up\.weight, the model 256"):
        plan_gguf(checkpoint, GgufOptions(decoder="Q4_K_M", imatrix=small))


def _export(directory: Path, preset: str, matrix: ImportanceMatrix, out: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(directory)
    options = GgufOptions(decoder=preset, onnx_vision="none", imatrix=matrix)
    export_gguf(checkpoint, plan_gguf(checkpoint, options), out)
    return _tensors(out / f"model-{preset.lower()}.gguf")


def _tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _quantize(llama_cpp: Any, source: Path, folder: Path, preset: str, matrix: ImportanceMatrix) -> dict[str, Any]:
    """What llama.cpp's own quantiser makes of a float32 file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{preset}"].value
    params.nthread = 1
    kept: list[NDArray[np.float32]] = []
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix.weights) + 1))()  # the last, without a name, ends it
    for entry, (name, each) in zip(entries, matrix.weights.items(), strict=False):
        kept.append(each.importance)
        entry.name = name.encode()
        entry.data = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(kept[-1])
    params.imatrix = entries
    import_llama_cpp()  # silences its log
    target = folder / "stock.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return _tensors(target)
