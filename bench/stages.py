"""Times each stage of a model directory, the host's share of a decoded token, and peak anonymous memory.

    python bench/stages.py MODEL [--grids 16x16,32x32] [--prefill 512] [--tokens 32] [--threads N]

Anonymous memory is the resident set less what is mapped from files, sampled while the stages run (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

import phisight
from phisight.naflex import Patches


class MemoryWatch(threading.Thread):
    """Peak of resident memory that no file backs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.01):
            info = process.memory_info()
            self.peak = max(self.peak, info.rss - getattr(info, "shared", 0))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Median seconds of a few runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class EngineClock:
    """Adds up the time inside the engine's run call of a decoder's session."""

    def __init__(self, model: phisight.Model) -> None:
        self.seconds = 0.0
        decoder: Any = model._decoder._decoder
        session = decoder._session
        clock = self

        class Timed:
            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
                started = time.perf_counter()
                session.run_with_iobinding(binding, options)
                clock.seconds += time.perf_counter() - started

        decoder._session = Timed()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    watch = MemoryWatch()
    watch.start()
    started = time.perf_counter()
    threads = arguments.threads or "auto"
    model = phisight.load(arguments.model, threads=threads)
    report: dict[str, Any] = {"model": arguments.model, "notes": model.notes}
    report["load_seconds"] = time.perf_counter() - started
    rng = np.random.default_rng(0)
    for text in arguments.grids.split(",") if model.manifest.model.vision else []:
        rows, columns = map(int, text.split("x"))
        pixels = rng.uniform(-1, 1, (rows * columns, 768)).astype(np.float32)
        patches = Patches(pixels, (rows, columns), (16 * columns, 16 * rows))
        encoder: Any = model._encoder.engine
        report[f"encode_{text}_seconds"] = best_of(3, lambda p=patches, e=encoder: e.encode(p))
    ids = rng.integers(0, 256, arguments.prefill)

    def prefill() -> None:
        model._decoder.forget()
        generation = model.generate_tokens(ids, options=model.options(max_tokens=1, temperature=0))
        list(generation)

    report["prefill_tokens_per_second"] = arguments.prefill / best_of(2, prefill)
    clock = EngineClock(model)
    options = model.options(max_tokens=arguments.tokens + 1, temperature=arguments.temperature, seed=0)
    generation = model.generate_tokens(ids[:16], options=options)
    next(generation)  # the prefill
    clock.seconds = 0.0
    started = time.perf_counter()
    steps = sum(1 for _ in generation)
    seconds = time.perf_counter() - started
    report["decode_tokens_per_second"] = steps / seconds
    report["decode_steps"] = steps
    report["host_milliseconds_per_token"] = 1e3 * (seconds - clock.seconds) / steps
    report["host_share"] = (seconds - clock.seconds) / seconds
    report["peak_anonymous_mib"] = watch.stop() / 2**20
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--grids", default="16x16,32x32")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temperature", type=float, default=0.8)
    print(json.dumps(measure(parser.parse_args()), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
