"""Processors whose integer products saturate: how they are found, and that results stay right on them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

import phisight
from phisight.backends import ort_session
from phisight.backends.ort_session import IntegerProducts, SessionSettings, integer_products, open_session
from phisight.export.onnx_saturation import saturation_graph

Exporter = Callable[..., Path]
IDS = list(range(40, 72))
NOTE = "this processor's INT8 products saturate: slower, exact kernels are used"


def test_the_shipped_graph_is_the_one_in_the_source() -> None:
    shipped = files("phisight.backends").joinpath("saturation.onnx").read_bytes()
    assert onnx.load_model_from_string(shipped) == onnx.load_model_from_string(saturation_graph())
    assert len(shipped) < 8192


def test_this_processor() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    if not flags & {"avx512_vnni", "avx_vnni", "asimddp"}:
        pytest.skip(f"/proc/cpuinfo of this {platform.machine()} names no exact INT8 products: nothing is known")
    assert integer_products() == IntegerProducts(True, True)


def _pretend(monkeypatch: pytest.MonkeyPatch, integer: float, blocks: float) -> IntegerProducts:
    """What is concluded from these sums."""
    results: list[NDArray[Any]] = [np.full((2, 32), integer, np.int32), np.full((2, 32), blocks, np.float32)]
    session = SimpleNamespace(run=lambda names, feed: results)
    fake = SimpleNamespace(InferenceSession=lambda graph, providers: session)
    monkeypatch.setattr(ort_session, "import_onnxruntime", lambda: fake)
    return integer_products.__wrapped__()


def test_saturated_sums_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 products of 255 x 127 are 2072640; where each pair stops at 32767 they are 32 x 32767."""
    exact, saturated = 64 * 255 * 127, 32 * 32767
    assert exact == 2072640
    assert _pretend(monkeypatch, exact, 64 * 127.0) == IntegerProducts(True, True)
    assert _pretend(monkeypatch, saturated, 64 * 127.0) == IntegerProducts(False, True)
    assert _pretend(monkeypatch, exact, 64 * 127.0 * 0.98) == IntegerProducts(True, False)
    assert not _pretend(monkeypatch, saturated, 64 * 120.0).exact


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without exact products."""
    monkeypatch.setattr(ort_session, "integer_products", lambda: IntegerProducts(False, False))


@pytest.mark.parametrize(
    ("products", "precision", "level"),
    [
        (IntegerProducts(True, True), None, 4),
        (IntegerProducts(False, True), "1", 4),
        (IntegerProducts(True, False), None, 0),
        (IntegerProducts(False, False), "1", 0),
    ],
)
def test_sessions(
    tiny_checkpoint: Path,
    exported: Exporter,
    monkeypatch: pytest.MonkeyPatch,
    products: IntegerProducts,
    precision: str | None,
    level: int,
) -> None:
    """What the engine is told, and the level in the graph that it opens."""
    path = exported(tiny_checkpoint, decoder="int8") / "decoder.onnx"
    opened: list[Any] = []
    ort = ort_session.import_onnxruntime()
    real = ort.InferenceSession

    def spy(model: str | bytes, *arguments: Any, **options: Any) -> Any:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        opened.append(onnx.load_model_from_string(data))
        return real(model, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    session = open_session(path, SessionSettings(products=products))
    found = None
    with suppress(RuntimeError):  # the entry is not there
        found = session.get_session_options().get_session_config_entry("session.x64quantprecision")
    assert found == precision
    levels = [
        attribute.i
        for node in opened[0].graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert levels == [level] * 17  # four layers of four matrices, and the head


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("decoder", ["int8", "int4"])
def test_results_stay_right(
    golden: Path,
    tiny_checkpoint: Path,
    exported: Exporter,
    synthetic_image: Callable[[str, int, int, int], Image.Image],
    decoder: str,
) -> None:
    directory = exported(tiny_checkpoint, decoder=decoder)  # the tower is w8a8
    model = phisight.load(directory, threads=2)
    assert NOTE in model.notes
    # Decoder: as without any rounding of activations.
    exact = phisight.load(directory, threads=2, accuracy_level=0).score(IDS)
    np.testing.assert_array_equal(model.score(IDS), exact)
    # Even if level 4 is asked for.
    np.testing.assert_array_equal(phisight.load(directory, threads=2, accuracy_level=4).score(IDS), exact)
    # Tower: INT8 weights and activations cost 2 % of the reference's features here.
    features = model.encode_image(model.preprocess(synthetic_image("RGB", 250, 250, 0)))
    with np.load(golden / "tiny_golden/img_250x250.npz") as file:
        wanted = file["img0/projected"]
    assert np.linalg.norm(features - wanted) < 0.03 * np.linalg.norm(wanted)


def test_nothing_is_said_where_products_are_exact(
    tiny_checkpoint: Path, exported: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_session, "integer_products", lambda: IntegerProducts(True, True))
    model = phisight.load(exported(tiny_checkpoint, decoder="int8"), threads=2)
    assert NOTE not in model.notes
