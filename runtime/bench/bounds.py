"""What a device can do at most: bytes read from memory and products a second.

On a CPU `integer_peak.onnx` (backends/) is one MatMulInteger of uint8 (m, 2048) and int8 (2048, 2048). The latter is an
Expand of one value, which the engine makes a constant of at load, so that it is packed as weights are. On a GPU
`copy_float16.onnx` copies an array, and `product_float16.onnx` is one MatMul of two float16 matrices that lie there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import Device, SessionSettings, import_onnxruntime, on_device, open_session
from phisight.bench.clock import seconds_of

__all__ = ["Bounds", "measure_bounds"]

SIDE = 2048
"""Of the square matrices; the graph has it too."""
GPU_SIDE = 4096
READ_BYTES = 512 << 20
"""Far more than any cache holds."""
TRIES = 5
RUNS = 8
"""Of a try on a GPU, whose single runs end too soon to be timed."""


@dataclass(frozen=True)
class Bounds:
    """`read_rate` in bytes a second, `product_rate` in operations (a product and its addition are two) on `products`.

    On a CPU both are of `threads` threads.
    """

    threads: int
    read_rate: float
    product_rate: float
    products: Literal["integer", "float16"] = "integer"


def measure_bounds(threads: int, device: Device = "cpu") -> Bounds:
    """The best of a few tries, in about two seconds. Raises EngineError without ONNX Runtime or the device."""
    if device == "cpu":
        return Bounds(threads, _read_rate(threads), _integer_rate(threads))
    halves = np.random.default_rng(0).normal(size=READ_BYTES // 2).astype(np.float16)
    # A copy reads and writes.
    copying = _gpu_seconds("copy_float16.onnx", {"x": halves.reshape(1, 1, GPU_SIDE, -1)}, device)
    square = halves[: GPU_SIDE**2].reshape(GPU_SIDE, GPU_SIDE)
    multiplying = _gpu_seconds("product_float16.onnx", {"a": square, "b": square}, device)
    return Bounds(threads, 2 * halves.nbytes / copying, 2 * GPU_SIDE**3 / multiplying, "float16")


def _read_rate(threads: int) -> float:
    memory = np.ones(READ_BYTES // 8, np.int64)
    parts = np.array_split(memory, threads)

    def read(part: NDArray[np.int64]) -> int:
        return int(np.bitwise_or.reduce(part))  # one instruction a word: memory is what it waits for

    with ThreadPoolExecutor(threads) as pool:
        best = min(seconds_of(lambda: list(pool.map(read, parts))) for _ in range(TRIES))
    return memory.nbytes / best


def _integer_rate(threads: int) -> float:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = files("phisight.backends").joinpath("integer_peak.onnx").read_bytes()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {"a": np.full((SIDE, SIDE), 3, np.uint8)}
    best = min(seconds_of(lambda: session.run(["y"], feed)) for _ in range(TRIES))
    return 2 * SIDE**3 / best


def _gpu_seconds(graph: str, feed: dict[str, NDArray[np.float16]], device: Device) -> float:
    """The least seconds of one run of a graph with an output "y" like its inputs, all on the device."""
    with as_file(files("phisight.backends").joinpath(graph)) as path:
        session = open_session(path, SessionSettings(device))
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, on_device(array, device))
    binding.bind_ortvalue_output("y", on_device(next(iter(feed.values())), device))

    def runs() -> None:
        for _ in range(RUNS):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    runs()
    return min(seconds_of(runs) for _ in range(TRIES)) / RUNS
