"""Rows of an exported model's tensors, as the engines see them: read from the files and turned back into float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import onnx
from numpy.typing import NDArray

from phisight.errors import ModelDirError
from phisight.export.gguf_plan import from_kernel
from phisight.export.names import EMBEDDINGS, PATCH_EMBEDDING, POSITION_TABLE, TensorSpec, gguf_name
from phisight.export.quantized import PackedRows
from phisight.gguf_file import GgufFile
from phisight.manifest import Manifest, TensorEntry
from phisight.quant.blocks import Blocks, Channels, dequantize_blocks, dequantize_channels
from phisight.quant.ggml import ggml_row_bytes, ggml_type
from phisight.quant.scheme import SCHEMES, BlockScheme, ChannelScheme

__all__ = ["OnnxTensors", "StoredTensors", "open_stored"]

Rows = NDArray[np.intp]
Floats = NDArray[np.float32]


class StoredTensors(Protocol):
    """The tensors of some of a directory's files."""

    def rows(self, spec: TensorSpec, entry: TensorEntry, rows: Rows) -> Floats:
        """Some rows, in the shape that the checkpoint has them. Raises ModelDirError for a tensor that is not there."""
        ...


def open_stored(directory: Path, manifest: Manifest) -> Mapping[str, StoredTensors]:
    """By the parts of the manifest's entries. Raises ModelDirError for files that are missing or damaged."""
    files: dict[str, StoredTensors] = {}
    if manifest.format == "gguf":
        for name in manifest.files:
            held = {"model-": ("decoder", "head", "embeddings"), "mmproj-": ("vision", "projector")}
            for start, parts in held.items():
                if name.startswith(start):
                    files |= dict.fromkeys(parts, _Gguf(directory / name))
    else:
        files |= dict.fromkeys(("decoder", "head"), OnnxTensors(directory / "decoder.onnx"))
        files["embeddings"] = _Embeddings(directory)
    if "vision.onnx" in manifest.files:
        vision = OnnxTensors(directory / "vision.onnx")
        files |= (
            {"onnx_vision": vision} if manifest.format == "gguf" else dict.fromkeys(("vision", "projector"), vision)
        )
    return files


class OnnxTensors:
    """A graph's weights in the file beside it, found by the graph's own words, not by the exporter's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        graph = onnx.load(path, load_external_data=False).graph
        self._found = {each.name: each for each in graph.initializer if each.external_data}

    def rows(self, spec: TensorSpec, entry: TensorEntry, rows: Rows) -> Floats:
        name, scheme = spec.name, SCHEMES.get(entry.scheme)
        if isinstance(scheme, BlockScheme):
            return dequantize_blocks(self.blocks(spec, scheme, rows))
        if isinstance(scheme, ChannelScheme):
            q = np.ascontiguousarray(self._map(name + ".int8")[:, rows].T)
            return dequantize_channels(Channels(q, self._map(name + ".scale")[rows]))
        weights = self._map(name)
        if len(spec.shape) == 2 and name != POSITION_TABLE:
            return np.ascontiguousarray(weights[:, rows].T, np.float32)
        return np.asarray(weights[rows], np.float32)

    def blocks(self, spec: TensorSpec, scheme: BlockScheme, rows: Rows) -> Blocks:
        """Some rows of a matrix as they are stored. Raises ModelDirError for one that is not there."""
        packed, scale = self._map(spec.name + ".packed")[rows], self._map(spec.name + ".scales")[rows]
        zero = None if scheme.symmetric else self._map(spec.name + ".zeros")[rows]
        return PackedRows(packed, scale, zero).blocks(spec.shape[1], scheme.bits)

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self._found:
            raise ModelDirError(f"{self._path} has no weight {name}, which its manifest tells of: export it again")
        tensor = self._found[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self._path.with_name(place["location"])
        return np.memmap(file, dtype, "r", int(place["offset"]), tuple(tensor.dims))


class _Embeddings:
    """The table from which the host reads rows."""

    def __init__(self, directory: Path) -> None:
        self._table = np.load(directory / "embeddings.npy", mmap_mode="r")
        scales = directory / "embeddings.scales.npy"
        self._scales = np.load(scales, mmap_mode="r") if scales.is_file() else None

    def rows(self, spec: TensorSpec, entry: TensorEntry, rows: Rows) -> Floats:
        assert spec.name == EMBEDDINGS
        table = np.asarray(self._table[rows], np.float32)
        if self._scales is None:
            return table
        scales = np.asarray(self._scales[rows], np.float32)
        blocks = np.repeat(scales, -(-table.shape[1] // scales.shape[1]), axis=1)
        return table * blocks[:, : table.shape[1]]


class _Gguf:
    """A GGUF file's tensors, restored by gguf-py's own code."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile.read(path)

    def rows(self, spec: TensorSpec, entry: TensorEntry, rows: Rows) -> Floats:
        tensor = self._file.tensors.get(gguf_name(spec.name))
        if tensor is None:
            raise ModelDirError(f"{self._file.path} has no {gguf_name(spec.name)}: export it again")
        count = 1 if len(tensor.shape) == 1 else tensor.shape[0]
        columns = tensor.size // count
        shape = (count, ggml_row_bytes(tensor.type_name, columns))
        data = np.memmap(self._file.path, np.uint8, "r", tensor.offset, shape)
        chosen = np.ascontiguousarray(data if len(tensor.shape) == 1 else data[rows])
        restored: Floats = gguf.dequantize(chosen, ggml_type(tensor.type_name)).astype(np.float32, copy=False)
        if len(tensor.shape) == 1:
            return restored.reshape(-1)[rows]
        if spec.name == PATCH_EMBEDDING + ".weight":
            restored = from_kernel(restored)
        return restored.reshape(len(rows), -1)
