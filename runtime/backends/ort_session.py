"""Opening ONNX Runtime sessions: the package, the device, and processors whose integer products saturate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_webgpu import PROVIDER, add_webgpu, on_webgpu
from phisight.errors import EngineError

__all__ = [
    "Device",
    "IntegerProducts",
    "SessionSettings",
    "import_onnxruntime",
    "integer_products",
    "on_device",
    "open_session",
    "package_installed",
    "shrinking_run",
]

Device = Literal["cpu", "cuda", "webgpu"]

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu")
"""Distributions of one and the same module."""

ACCURACY_LEVEL = b"accuracy_level\x18"
"""An attribute's name and the tag of its integer, in the protobuf of a graph: the next byte is the level."""


@dataclass(frozen=True)
class IntegerProducts:
    """Whether this processor multiplies INT8 exactly, for MatMulInteger and for MatMulNBits with 8 bits.

    Without VNNI instructions the kernels add pairs of products in 16 bits, which saturate: sums are then silently
    wrong (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """

    matmul_integer: bool
    matmul_nbits: bool

    @property
    def exact(self) -> bool:
        return self.matmul_integer and self.matmul_nbits


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are opened. `accuracy_level` None leaves MatMulNBits as it was exported."""

    device: Device = "cpu"
    threads: int = 1
    accuracy_level: Literal[0, 4] | None = None
    products: IntegerProducts = IntegerProducts(True, True)


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises EngineError that names the extra, or packages in each other's way."""
    installed = [name for name in PACKAGES if package_installed(name)]
    if len(installed) > 1:
        raise EngineError(
            f"{' and '.join(installed)} are installed and overwrite each other: "
            'pip uninstall them all, then pip install "phisight[cuda]" or "phisight[cpu]"'
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f'ONNX Runtime cannot be imported ({error}): pip install "phisight[cpu]", or [cuda] for an NVIDIA GPU'
        ) from None
    return onnxruntime


@cache
def integer_products() -> IntegerProducts:
    """Try the largest products on this processor, with a graph of 5 kB. See `IntegerProducts`."""
    ort = import_onnxruntime()
    graph = files("phisight.backends").joinpath("saturation.onnx").read_bytes()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    columns = 64
    integer, blocks = session.run(
        ["integer", "blocks"],
        {"unsigned": np.full((2, columns), 255, np.uint8), "floats": np.full((2, columns), 1.0, np.float32)},
    )
    return IntegerProducts(
        matmul_integer=bool(np.all(integer == 255 * 127 * columns)),
        matmul_nbits=bool(np.allclose(blocks, 127.0 * columns, rtol=1e-3)),
    )


def open_session(path: Path, settings: SessionSettings) -> Any:
    """An InferenceSession that really runs on the device asked for. Raises EngineError."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = settings.accuracy_level
    if settings.device == "cpu" and not settings.products.matmul_integer:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if settings.device == "cpu" and not settings.products.matmul_nbits:
        level = 0
    providers: list[str] | None = ["CPUExecutionProvider"]
    if settings.device == "cuda":
        _load_cuda_libraries(ort)
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if settings.device == "webgpu":
        providers = add_webgpu(ort, options)
    model: str | bytes = str(path)
    if level is not None:
        model = _with_accuracy_level(path.read_bytes(), level)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the engine raises classes of its own, which differ between versions
        raise EngineError(f"ONNX Runtime cannot open {path}: {error}") from error
    if settings.device == "webgpu" and PROVIDER not in session.get_providers():
        raise EngineError("WebGPU was asked for, but ONNX Runtime could not start it: run with --device cpu")
    if settings.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise EngineError(
            "CUDA was asked for, but ONNX Runtime could not start it: check the driver with nvidia-smi, "
            'install with pip install "phisight[cuda]", or run with --device cpu'
        )
    return session


def on_device(array: NDArray[Any], device: Device) -> Any:
    """An OrtValue in the device's memory that holds the array; on the CPU it shares the array's."""
    ort = import_onnxruntime()
    return on_webgpu(ort, array) if device == "webgpu" else ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def shrinking_run(device: Device) -> Any:
    """Options of a run after which the CPU's memory arena gives back what it does not need.

    Without it the largest image ever encoded stays in memory as working space.
    """
    options = import_onnxruntime().RunOptions()
    if device == "cpu":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _with_accuracy_level(graph: bytes, level: int) -> bytes:
    """The graph with another accuracy_level in every MatMulNBits: one byte each, the length stays."""
    for old in (0, 4):
        graph = graph.replace(ACCURACY_LEVEL + bytes([old]), ACCURACY_LEVEL + bytes([level]))
    return graph


def _load_cuda_libraries(ort: Any) -> None:
    """CUDA and cuDNN from the packages of the extra, which no search path knows."""
    if hasattr(ort, "preload_dlls"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ort.preload_dlls()


def package_installed(name: str) -> bool:
    """Whether a distribution of this name is in the environment."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
