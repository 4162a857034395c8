"""How fast a model is and how much memory it takes, in a process of its own: nothing of another model is in it.

load -> one question to warm up -> some questions: pixels, encoding, prefill, decoding, each by itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import numpy as np

from phisight.child_process import ChildProcess
from phisight.compare.memory import peak_memory
from phisight.compare.passages import Asking, Passage, Question, ask, to_score
from phisight.compare.subjects import Subject
from phisight.model import Model

__all__ = ["MOST_PASSAGES", "RATES", "chosen", "measure_speed"]

MOST_PASSAGES = 13
"""One to warm up, and what the quartiles are taken of."""

RATES = {
    "prepare_tokens_per_second": ("image_tokens", "preprocess_seconds"),
    "encode_tokens_per_second": ("image_tokens", "encode_seconds"),
    "prefill_tokens_per_second": ("prefill_positions", "prefill_seconds"),
    "decode_tokens_per_second": ("decode_steps", "decode_seconds"),
    "score_tokens_per_second": ("score_positions", "score_seconds"),
}
"""Count and seconds of each rate. Questions have the first four, windows of a text the last."""


def chosen(passages: Sequence[Passage]) -> list[Passage]:
    """Passages from first to last at equal distances."""
    count = min(len(passages), MOST_PASSAGES)
    return [passages[number * len(passages) // count] for number in range(count)]


def measure_speed(
    subject: Subject, passages: Sequence[Passage], asking: Asking, progress: Callable[[int], None]
) -> dict[str, Any]:
    """load_seconds, peak_bytes, and of each rate median, quartiles and their number, or None where nothing was timed.

    Raises what the model raises, and EngineError if its process ends.
    """
    with ChildProcess(subject.name, _report, subject, passages, asking) as process:
        while not isinstance(said := process.receive(), dict):
            progress(said)
        return said


def _report(pipe: Connection, subject: Subject, passages: Sequence[Passage], asking: Asking) -> None:
    """In the other process: numbers of passages done, then the figures."""
    pipe.send(_measure(subject, passages, asking, pipe))


def _measure(subject: Subject, passages: Sequence[Passage], asking: Asking, pipe: Connection) -> dict[str, Any]:
    started = perf_counter()
    model = subject.open()
    load_seconds = perf_counter() - started
    samples: dict[str, list[float]] = {name: [] for name in RATES}
    for number, passage in enumerate(passages):
        timed = _timed(model, passage, asking)
        pipe.send(1)
        if number == 0 and len(passages) > 1:
            continue
        for name, (count, seconds) in RATES.items():
            if timed.get(count) and timed.get(seconds):
                samples[name].append(timed[count] / timed[seconds])
    rates = {name: _spread(values) for name, values in samples.items()}
    return {"load_seconds": load_seconds, "peak_bytes": peak_memory(), **rates}


def _timed(model: Model, passage: Passage, asking: Asking) -> dict[str, float]:
    if isinstance(passage, Question):
        return ask(model, passage, asking).answer.stats.as_json()
    ids, targets = to_score(passage)
    started = perf_counter()
    model.score(ids, (), last=len(targets))
    return {"score_seconds": perf_counter() - started, "score_positions": len(ids)}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "p25": low, "p75": high, "n": len(values)}
