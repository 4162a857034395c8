"""Asymmetric INT4 from the plan to the engine: what ONNX Runtime computes is what the stored integers mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import phisight
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_onnx, plan_export
from phisight.export.plan import ExportOptions
from phisight.export.quantized import PackedRows, QuantizedWeights
from phisight.manifest import Manifest
from phisight.quant.blocks import dequantize_blocks, quantize_blocks
from phisight.quant.methods.search import ScaleSearch
from phisight.quant.scheme import BlockScheme

OPTIONS = {"decoder": "int4", "head": "int4", "vision": "f32", "accuracy_level": 0, "asymmetric": True}
IDS = [1, 5, 9, 30, 200, 7, 7, 64, 100, 3]


def _stored(directory: Path) -> dict[str, NDArray[np.float32]]:
    """The decoder's matrices as the file has them, dequantised, by their names in the checkpoint."""
    graph = onnx.load(directory / "decoder.onnx").graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    columns = {
        node.input[1].removesuffix(".packed"): next(a.i for a in node.attribute if a.name == "K")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    return {
        name: dequantize_blocks(
            PackedRows(arrays[f"{name}.packed"], arrays[f"{name}.scales"], arrays[f"{name}.zeros"]).blocks(count, 4)
        )
        for name, count in columns.items()
    }


@pytest.mark.parametrize("block_size", [32, 128])
def test_the_engine_multiplies_what_the_file_means(
    block_size: int, tiny_checkpoint: Path, checkpoint_copy: Path, exported: Callable[..., Path]
) -> None:
    directory = exported(tiny_checkpoint, block_size=block_size, **OPTIONS)
    stored = _stored(directory)
    assert len(stored) == 4 * 4 + 1
    manifest = Manifest.read(directory)
    label = f"int4 block {block_size} asymmetric"
    assert {manifest.tensors[name].scheme for name in stored} == {label}
    assert manifest.options["asymmetric"] == 1

    weights = load_file(checkpoint_copy / "model.safetensors")
    # The host reads INT8 embeddings in both.
    table = weights["model.embed_tokens.weight"].astype(np.float32)
    stored["model.embed_tokens.weight"] = dequantize_blocks(quantize_blocks(table, BlockScheme(8, 32)))
    same = {name: rows.astype(weights[name].dtype) for name, rows in stored.items()}
    save_file({**weights, **same}, checkpoint_copy / "model.safetensors")
    plain = exported(checkpoint_copy, decoder="f32", vision="f32", head="f32")
    found, wanted = (phisight.load(each, threads=1).score(IDS) for each in (directory, plain))
    np.testing.assert_allclose(found, wanted, atol=2e-4 * float(np.abs(wanted).max()))


def test_a_method_that_knows_the_data_keeps_zero_points(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    plan = plan_export(checkpoint, ExportOptions(decoder="int4", asymmetric=True, vision="f32", method="search"))
    name = "model.layers.1.mlp.down_proj.weight"
    scheme = plan.schemes[name]
    assert isinstance(scheme, BlockScheme)
    weights = checkpoint.tensors[name].load()
    blocks = ScaleSearch().quantize(weights, scheme)
    assert blocks.zero is not None and len(np.unique(blocks.zero)) > 2
    kept = QuantizedWeights(tmp_path / "kept")
    kept.keep(name, weights.shape, scheme, [blocks.part(slice(0, 50)), blocks.part(slice(50, None))])
    (back,) = kept.blocks(name, weights.shape[1], scheme)
    np.testing.assert_array_equal(dequantize_blocks(back), dequantize_blocks(blocks))
    export_onnx(checkpoint, plan, tmp_path / "model", quantized=kept, calibration={})
    np.testing.assert_array_equal(_stored_one(tmp_path / "model", name), dequantize_blocks(blocks))
    # An earlier run's zero points do not stay with symmetric blocks.
    kept.keep(name, weights.shape, BlockScheme(4, 32), [ScaleSearch().quantize(weights, BlockScheme(4, 32))])
    (symmetric,) = kept.packed(name)
    assert symmetric.zero is None


def _stored_one(directory: Path, name: str) -> NDArray[np.float32]:
    graph = onnx.load(directory / "decoder.onnx").graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    rows = PackedRows(arrays[f"{name}.packed"], arrays[f"{name}.scales"], arrays[f"{name}.zeros"])
    return dequantize_blocks(rows.blocks(rows.scale.shape[1] * 32, 4))


def test_asymmetric_blocks_of_eight_bits_are_refused() -> None:
    with pytest.raises(InputError, match="the decoder is int8: take --decoder int4"):
        ExportOptions(decoder="int8", asymmetric=True)
