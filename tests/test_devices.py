"""Devices: the choice and its reason, and CUDA that is asked for and not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from phisight import devices
from phisight.backends import ort_session
from phisight.backends.ort_session import SessionSettings, import_onnxruntime, open_session
from phisight.devices import choose_device, engine_devices
from phisight.errors import EngineError, InputError
from phisight.loading import model_directory


@pytest.fixture
def gpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime-gpu were installed, and onnxruntime not."""
    for module in (devices, ort_session):
        monkeypatch.setattr(module, "package_installed", lambda name: name == "onnxruntime-gpu")


def test_the_cpu_without_the_gpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "package_installed", lambda name: False)
    assert choose_device("cpu", "f32").device == "cpu"
    choice = choose_device("auto", "f16")
    assert (choice.device, choice.reason) == ("cpu", "onnxruntime-gpu is not installed")
    with pytest.raises(InputError, match=r"phisight\[cuda\]"):
        choose_device("cuda", "f16")
    with pytest.raises(InputError, match="tpu"):
        choose_device("tpu", "f32")


@pytest.mark.usefixtures("gpu_package")
def test_cuda_wants_a_float16_model() -> None:
    assert choose_device("auto", "f16").device == "cuda"
    choice = choose_device("auto", "f32")
    assert choice.device == "cpu"
    assert "--float f16" in choice.reason
    with pytest.raises(InputError, match="--float f16"):
        choose_device("cuda", "f32")


@pytest.mark.skipif(ort_session.package_installed("onnxruntime-gpu"), reason="this environment may have a working CUDA")
def test_cuda_that_does_not_start_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(EngineError, match="CUDA was asked for"):
        open_session(model_directory("demo") / "vision.onnx", SessionSettings(device="cuda"))


def test_two_packages_in_each_others_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "package_installed", lambda name: True)
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu and onnxruntime-webgpu are installed"):
        import_onnxruntime()


def test_without_an_engine_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"phisight\[cpu\]"):
        import_onnxruntime()


def test_cuda_libraries_are_loaded_before_a_session_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    ort: Any = import_onnxruntime()
    called: list[str] = []
    monkeypatch.setattr(ort, "preload_dlls", lambda *_, **__: called.append("loaded"), raising=False)
    with pytest.raises(EngineError):
        open_session(Path("nothing.onnx"), SessionSettings(device="cuda"))
    assert called == ["loaded"]


def test_engines_that_are_missing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ort, _, llama = engine_devices()
    assert ort.devices[0] == "cpu"
    assert llama.devices[0] == "cpu"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    ort, openvino, llama = engine_devices()
    assert (ort.devices, openvino.devices, llama.devices) == ((), (), ())
    assert "phisight[cpu]" in ort.reason
    assert "phisight[openvino]" in openvino.reason
    assert "phisight[gguf]" in llama.reason
