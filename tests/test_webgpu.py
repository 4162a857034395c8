"""WebGPU beside the CPU on the same decoders; `python .ci/webgpu.py` runs all of it without a GPU.

SwiftShader, the software adapter that it uses, computes attention of several positions wrongly where they see more than
4, and has no float16: so positions are run one by one, graphs are of float32, and the tower is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight import devices
from phisight.backends.ort import OrtDecoder
from phisight.backends.ort_session import import_onnxruntime
from phisight.backends.ort_webgpu import PROVIDER, on_webgpu, webgpu_installed
from phisight.devices import choose_device, engine_devices
from phisight.errors import EngineError, InputError
from phisight.loading import checkpoint_directory
from phisight.model import Model
from phisight.options import GenerateOptions

Exporter = Callable[..., Path]
DEMO = checkpoint_directory("demo")
TOLERANCE = 1e-3

needs_provider = pytest.mark.skipif(
    PROVIDER not in import_onnxruntime().get_available_providers(),
    reason="this onnxruntime has no WebGPU: python .ci/webgpu.py runs these tests in an environment of their own",
)


@pytest.fixture(scope="module")
def models(exported: Exporter) -> dict[str, Model]:
    directory = exported(DEMO, decoder="int4", vision="f32")
    return {name: phisight.load(directory, device=name, threads=1, accuracy_level=0) for name in ("cpu", "webgpu")}


@pytest.fixture
def decoders(models: dict[str, Model]) -> Iterator[tuple[OrtDecoder, OrtDecoder]]:
    """On the CPU and on the GPU, empty."""
    both = []
    for model in models.values():
        decoder = model._decoder._decoder
        assert isinstance(decoder, OrtDecoder)
        both.append(decoder.fork())
    yield both[0], both[1]


def appended(decoder: OrtDecoder, piece: NDArray[Any]) -> NDArray[np.float32]:
    """Logits of all positions, run one by one."""
    return np.concatenate([decoder.append([piece[i : i + 1]]).copy() for i in range(len(piece))])


@needs_provider
def test_logits_are_those_of_the_cpu(decoders: tuple[OrtDecoder, OrtDecoder]) -> None:
    """Token ids and image features, in a cache that grows and is cut."""
    cpu, gpu = decoders
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.5, (9, cpu.hidden_size)).astype(np.float32)
    for length, piece in ((0, np.arange(30, dtype=np.int32)), (23, features), (32, np.arange(7, dtype=np.int32))):
        for decoder in decoders:
            decoder.truncate(length)
        gpu.reserve(gpu.length + len(piece) + 3)
        np.testing.assert_allclose(appended(gpu, piece), appended(cpu, piece), atol=TOLERANCE)
    for decoder in decoders:
        decoder.truncate(0)
    chunk = np.arange(4, dtype=np.int32)
    np.testing.assert_allclose(gpu.append([chunk], "all"), cpu.append([chunk], "all"), atol=TOLERANCE)


@needs_provider
def test_the_cache_lies_there_and_can_be_kept(decoders: tuple[OrtDecoder, OrtDecoder]) -> None:
    cpu, gpu = decoders
    ids = np.arange(20, dtype=np.int32)
    for decoder in decoders:
        appended(decoder, ids)
    assert all(value.device_name() != "cpu" for pair in gpu._cache for value in pair)
    states = [np.frombuffer(decoder.state_save(), np.float32) for decoder in decoders]
    np.testing.assert_allclose(*states, atol=TOLERANCE)
    twin = gpu.fork()
    twin.state_load(states[0].tobytes())
    np.testing.assert_allclose(twin.append([ids[:1]]), cpu.append([ids[:1]]), atol=TOLERANCE)


@needs_provider
def test_answers_are_those_of_the_cpu(models: dict[str, Model]) -> None:
    options = GenerateOptions(temperature=0, max_tokens=40, prefill_chunk=1)
    for question in ("How much is 17+25?", "How much is 3+53?"):
        found, right = (models[name].generate(question, options=options) for name in ("webgpu", "cpu"))
        assert (found.thought, found.text) == (right.thought, right.text)


@needs_provider
def test_what_webgpu_cannot_compute_is_refused(exported: Exporter) -> None:
    with pytest.raises(InputError, match="WebGPU has no INT8 products"):
        phisight.load(exported(DEMO, decoder="int4", vision="w8a8"), device="webgpu", threads=1)
    with pytest.raises(InputError, match="WebGPU's attention cannot read"):
        phisight.load(exported(DEMO, decoder="f32", vision="f32", kv="int8"), device="webgpu", kv_type="int8")
    assert "webgpu" in engine_devices()[0].devices


@needs_provider
def test_an_array_goes_there_and_comes_back() -> None:
    array = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float32)
    value = on_webgpu(import_onnxruntime(), array)
    assert value.device_name() != "cpu"
    np.testing.assert_array_equal(value.numpy(), array)


def test_the_shipped_graphs_are_those_in_the_source() -> None:
    from phisight.export.onnx_small import small_graphs

    shipped = files("phisight.backends")
    assert {name: shipped.joinpath(name).read_bytes() for name in small_graphs()} == small_graphs()


def test_without_the_provider_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "webgpu_installed", lambda ort: False)
    with pytest.raises(InputError, match=r"phisight\[webgpu\]"):
        choose_device("webgpu", "f32")
    assert 'no webgpu: pip install "phisight[webgpu]"' in engine_devices()[0].reason


def test_without_a_gpu_it_is_an_error_and_never_the_cpu(exported: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the plug-in finds none."""
    from phisight.backends import ort_webgpu

    ort = import_onnxruntime()
    if PROVIDER in ort.get_available_providers():
        pytest.skip("this onnxruntime has WebGPU built in, and asks nobody")
    monkeypatch.setattr(ort_webgpu, "find_spec", lambda name: object())
    monkeypatch.setattr(ort_webgpu, "_plugged_in", lambda module: tuple(ort.get_ep_devices()))
    assert webgpu_installed(ort)
    with pytest.raises(EngineError, match="WebGPU was asked for, but finds no GPU here"):
        phisight.load(exported(DEMO, decoder="int4", vision="f32"), device="webgpu", threads=1)
    assert "no webgpu: WebGPU was asked for" in engine_devices()[0].reason
