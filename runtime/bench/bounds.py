"""What the machine can do at most: bytes read from memory and integer operations a second.

`integer_peak.onnx` (backends/) is one MatMulInteger of uint8 (m, 2048) and int8 (2048, 2048). The latter is an Expand
of one value, which the engine makes a constant of at load, so that it is packed as weights are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import import_onnxruntime
from phisight.bench.clock import seconds_of

__all__ = ["Bounds", "measure_bounds"]

SIDE = 2048
"""Of the square matrices; the graph has it too."""
READ_BYTES = 512 << 20
"""Far more than any cache holds."""
TRIES = 5


@dataclass(frozen=True)
class Bounds:
    """Of so many threads: `read_rate` in bytes, `integer_rate` in operations (a product and its addition are two)."""

    threads: int
    read_rate: float
    integer_rate: float


def measure_bounds(threads: int) -> Bounds:
    """The best of a few tries, in about two seconds. Raises EngineError without ONNX Runtime."""
    return Bounds(threads, _read_rate(threads), _integer_rate(threads))


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
