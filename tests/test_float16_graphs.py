"""Float16 graphs, which CUDA needs, checked without a GPU: the float32 graphs' packed weights, and close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model

import phisight
from phisight.loading import checkpoint_directory

DEMO = checkpoint_directory("demo")
IDS = list(range(40, 72))


@pytest.fixture(scope="module")
def pair(exported: Callable[..., Path]) -> tuple[Path, Path]:
    """INT4 models of the same weights: graphs in float32, and in float16."""
    options = {"decoder": "int4", "vision": "f16", "accuracy_level": 0}
    return exported(DEMO, **options), exported(DEMO, **options, float_type="f16")


def packed(directory: Path) -> dict[str, bytes]:
    model = onnx.load(directory / "decoder.onnx", load_external_data=False)
    load_external_data_for_model(model, str(directory))
    return {tensor.name: tensor.raw_data for tensor in model.graph.initializer if tensor.name.endswith(".packed")}


def test_its_cache_is_float16_and_its_logits_are_not(pair: tuple[Path, Path]) -> None:
    model = onnx.load(pair[1] / "decoder.onnx", load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert types["past.0.key"] == types["present.0.value"] == onnx.TensorProto.FLOAT16
    assert types["logits"] == onnx.TensorProto.FLOAT


def test_packed_weights_are_the_same_bytes(pair: tuple[Path, Path]) -> None:
    full, half = map(packed, pair)
    assert len(full) > 8
    assert full == half


def test_on_the_cpu_it_is_close_to_the_float32_graph(pair: tuple[Path, Path]) -> None:
    full, half = (phisight.load(path, threads=1, device="cpu").score(IDS) for path in pair)
    assert 0 < np.abs(full - half).max() < 0.02 * np.abs(full).max()
