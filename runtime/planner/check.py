"""What a model really takes on this machine, in a process of its own, for comparison with a plan."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from phisight.answer import Stats
from phisight.child_process import ChildProcess
from phisight.compare.memory import peak_memory
from phisight.model import Model
from phisight.naflex import PATCH_SIZE

__all__ = ["Measured", "measure_model"]

TOKENS = 12
QUICK_SECONDS = 5.0
"""A question that takes less to its first token is asked three times."""


@dataclass(frozen=True)
class Measured:
    """Seconds are medians of a question's stages; `past` is where in the cache its steps were, about."""

    load_peak: int | None
    peak: int | None
    patches: int
    positions: int
    encode: float | None
    prefill: float
    first_token: float
    decode: float | None
    past: int


def measure_model(
    directory: Path, threads: int, images: int, patches: int, progress: Callable[[str], None]
) -> Measured:
    """Open a model and ask it about `images` images of about so many patches. Raises what the model raises."""
    with ChildProcess(str(directory), _serve, directory, threads, images, patches) as process:
        while not isinstance(said := process.receive(), Measured):
            progress(said)
        return said


def _serve(pipe: Connection, directory: Path, threads: int, images: int, patches: int) -> None:
    from phisight.loading import load

    model = load(directory, threads=threads)
    load_peak = peak_memory()
    pipe.send("opened")
    runs = [_ask(model, images, patches, 0)]
    pipe.send("asked once")
    if _first_token(runs[0]) < QUICK_SECONDS:  # the first run of a size also sets memory aside
        runs = [_ask(model, images, patches, seed) for seed in (1, 2, 3)]
    steps = [run.decode_seconds / run.decode_steps for run in runs if run.decode_steps]
    shown = runs[0].image_tokens
    pipe.send(
        Measured(
            load_peak=load_peak,
            peak=peak_memory(),
            patches=shown // images if images else 0,
            positions=runs[0].prefill_positions,
            encode=statistics.median(run.encode_seconds for run in runs) / images if images else None,
            prefill=statistics.median(run.prefill_seconds for run in runs),
            first_token=statistics.median(_first_token(run) for run in runs),
            decode=statistics.median(steps) if steps else None,
            past=runs[0].prefill_positions + TOKENS // 2,
        )
    )


def _ask(model: Model, images: int, patches: int, seed: int) -> Stats:
    """With an empty cache, about pictures that were never seen."""
    model.score(np.zeros(1, np.int64))
    side = int(patches**0.5)
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (side * PATCH_SIZE,) * 2 + (3,)).astype(np.uint8) for _ in range(images)]
    options = model.options(max_tokens=TOKENS, temperature=0)
    last = list(model.stream("What is written in the picture?", pictures, options=options))[-1]
    assert last.stats is not None
    return last.stats


def _first_token(stats: Stats) -> float:
    return stats.preprocess_seconds + stats.encode_seconds + stats.prefill_seconds
