"""Which device runs a model, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from phisight.backends.ort_session import Device, import_onnxruntime, package_installed
from phisight.backends.ort_webgpu import add_webgpu, webgpu_installed
from phisight.errors import EngineError, InputError

__all__ = [
    "PAIRED",
    "DeviceChoice",
    "DeviceRequest",
    "EngineDevices",
    "choose_device",
    "engine_devices",
    "llamacpp_devices",
]

DeviceRequest = Literal["auto", "cpu", "cuda", "webgpu", "openvino", "openvino:GPU", "openvino:NPU", "openvino+cpu"]

OPENVINO = "openvino"
PAIRED = "openvino+cpu"


@dataclass(frozen=True)
class DeviceChoice:
    """A device of ONNX Runtime, or OpenVINO's name of one where that runs the model; and why, in words for the user.

    `paired`: OpenVINO runs the chunks of a prompt alone, ONNX Runtime single tokens, both on the CPU.
    """

    device: Device
    reason: str
    openvino: str | None = None
    paired: bool = False

    @property
    def name(self) -> str:
        """As it is asked for."""
        if self.paired:
            return PAIRED
        return self.device if self.openvino is None else f"{OPENVINO}:{self.openvino}"


def choose_device(requested: str, float_type: str) -> DeviceChoice:
    """The device for a model whose graphs compute in `float_type` ("f32" or "f16").

    "auto" takes CUDA where onnxruntime-gpu is installed and the graphs are float16, which CUDA's attention needs.
    Whether the card really works shows when the session is opened: then it is an error, never a quiet fall to the CPU.
    OpenVINO and WebGPU are taken when they are asked for: what they bring depends on the machine (docs/engines.md).
    The commands take OpenVINO of themselves where it was measured to be faster (`phisight.engine_times`).

    Raises InputError for another request, CUDA with a float32 model or OpenVINO with a float16 one; EngineError without
    ONNX Runtime.
    """
    engine, _, unit = requested.partition(":")
    if requested == PAIRED or (engine == OPENVINO and requested != f"{OPENVINO}:"):
        if float_type != "f32":
            raise InputError(
                f"device {requested} needs a float32 model, this one is {float_type}: export it with --float f32"
            )
        return DeviceChoice("cpu", "as asked for", unit.upper() or "CPU", requested == PAIRED)
    if requested not in ("auto", "cpu", "cuda", "webgpu"):
        raise InputError(f"device is {requested!r}, wanted {', '.join(get_args(DeviceRequest))}")
    ort = import_onnxruntime()
    if requested == "webgpu":
        if not webgpu_installed(ort):
            raise InputError('device webgpu needs its provider: pip install "phisight[webgpu]"')
        return DeviceChoice("webgpu", "as asked for")
    if requested == "cpu":
        return DeviceChoice("cpu", "as asked for")
    gpu_package = package_installed("onnxruntime-gpu")
    if requested == "cuda":
        if not gpu_package:
            raise InputError(
                'device cuda needs onnxruntime-gpu: pip uninstall onnxruntime, pip install "phisight[cuda]"'
            )
        if float_type != "f16":
            raise InputError("device cuda needs a float16 model, this one is float32: export it with --float f16")
        return DeviceChoice("cuda", "as asked for")
    if gpu_package and float_type == "f16":
        return DeviceChoice("cuda", "onnxruntime-gpu is installed and the model is float16; --device cpu avoids it")
    if gpu_package:
        return DeviceChoice("cpu", "the model's graphs are float32, CUDA needs an export with --float f16")
    if float_type == "f32" and find_spec(OPENVINO) is not None:
        return DeviceChoice(
            "cpu", "phisight bench MODEL --against openvino was not run, which tells whether that is faster"
        )
    return DeviceChoice("cpu", "onnxruntime-gpu is not installed")


@dataclass(frozen=True)
class EngineDevices:
    """What one engine can be asked to run on here, and the reason for what it cannot."""

    engine: str
    devices: tuple[str, ...]
    reason: str


def engine_devices() -> list[EngineDevices]:
    """Every engine, installed or not. No device is started: whether one works shows when a model is opened."""
    return [_onnxruntime_devices(), _openvino_devices(), llamacpp_devices()]


def _onnxruntime_devices() -> EngineDevices:
    try:
        ort = import_onnxruntime()
    except EngineError as error:
        return EngineDevices("ONNX Runtime", (), str(error))
    found, reasons = ["cpu"], []
    if package_installed("onnxruntime-gpu"):
        found.append("cuda")
        reasons.append("cuda is tried when a float16 model is opened")
    else:
        reasons.append("no cuda: onnxruntime-gpu is not installed")
    if not webgpu_installed(ort):
        reasons.append('no webgpu: pip install "phisight[webgpu]"')
    else:
        try:
            add_webgpu(ort, ort.SessionOptions())
            found.append("webgpu")
            reasons.append("webgpu is used when asked for")
        except EngineError as error:
            reasons.append(f"no webgpu: {error}")
    return EngineDevices("ONNX Runtime", tuple(found), "; ".join(reasons))


def _openvino_devices() -> EngineDevices:
    if find_spec("openvino") is None:
        return EngineDevices("OpenVINO", (), 'not installed: pip install "phisight[openvino]"')
    from phisight.backends.openvino import import_openvino

    try:
        found = import_openvino().Core().available_devices
    except EngineError as error:
        return EngineDevices("OpenVINO", (), str(error))
    names = tuple(f"{OPENVINO}:{name}" for name in found)
    if "CPU" in found and find_spec("onnxruntime") is not None:
        names += (PAIRED,)
    return EngineDevices("OpenVINO", names, "used when asked for, or measured to be faster")


def llamacpp_devices() -> EngineDevices:
    """What llama.cpp was compiled for."""
    if find_spec("llama_cpp") is None:
        return EngineDevices("llama.cpp", (), 'not installed: pip install "phisight[gguf]"')
    from llama_cpp import llama_supports_gpu_offload

    if llama_supports_gpu_offload():
        return EngineDevices("llama.cpp", ("cpu", "gpu"), "a GPU is used by --gpu-layers")
    return EngineDevices("llama.cpp", ("cpu",), "no gpu: llama-cpp-python was compiled for the CPU alone")
