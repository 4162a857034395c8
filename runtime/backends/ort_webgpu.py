"""WebGPU in ONNX Runtime: GPUs of any maker, through Vulkan, Direct3D 12 or Metal.

Either of two packages brings it: onnxruntime-ep-webgpu plugs into the usual onnxruntime, and onnxruntime-webgpu takes
its place with the provider built in. https://onnxruntime.ai/docs/execution-providers/WebGPU-ExecutionProvider.html
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.errors import EngineError

__all__ = ["PROVIDER", "add_webgpu", "on_webgpu", "webgpu_installed"]

PROVIDER = "WebGpuExecutionProvider"
PLUGIN = "onnxruntime_ep_webgpu"
MEMORY = "webgpu"
"""ONNX Runtime's name for the provider's memory."""


def webgpu_installed(ort: Any) -> bool:
    """Whether a package is there that brings the provider; whether it finds a GPU shows when a session opens."""
    return PROVIDER in ort.get_available_providers() or find_spec(PLUGIN) is not None


def add_webgpu(ort: Any, options: Any) -> list[str] | None:
    """Let a session run there -> its providers; None where `options` names them. Raises EngineError without a GPU."""
    if PROVIDER in ort.get_available_providers():
        return [PROVIDER, "CPUExecutionProvider"]
    devices = [device for device in _plugged_in(ort) if device.ep_name == PROVIDER]
    if not devices:
        raise EngineError(
            "WebGPU was asked for, but finds no GPU here (Linux needs a Vulkan driver): install the card's driver, or "
            "run with --device cpu"
        )
    options.add_provider_for_devices(devices[:1], {})
    return None


def on_webgpu(ort: Any, array: NDArray[Any]) -> Any:
    """An OrtValue on the GPU that holds the float32 or float16 array.

    Python cannot ask ONNX Runtime for memory there, but an output may lie there: so a graph copies the array.
    """
    copying = _copying(ort, array.dtype.name)
    binding = copying.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
    binding.bind_output("y", MEMORY, 0)
    copying.run_with_iobinding(binding)
    return binding.get_outputs()[0]


@cache
def _plugged_in(ort: Any) -> tuple[Any, ...]:
    """The devices that all providers find once the plug-in is registered, which may be done once in a process."""
    ort.register_execution_provider_library(MEMORY, import_module(PLUGIN).get_library_path())
    return tuple(ort.get_ep_devices())


@cache
def _copying(ort: Any, dtype: str) -> Any:
    options = ort.SessionOptions()
    providers = add_webgpu(ort, options)
    graph = files("phisight.backends").joinpath(f"copy_{dtype}.onnx").read_bytes()
    return ort.InferenceSession(graph, options, providers=providers)
