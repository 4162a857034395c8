"""Two questions about one image in a conversation: seconds to the first token of each, in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

__all__ = ["question_seconds"]

SIDE = 512
"""Of the image, in pixels: 1024 patches where the model's budget allows as many."""


def question_seconds(directory: Path, threads: int, device: str = "cpu") -> tuple[float, float]:
    """Of the first question and of the second. Raises what opening the model raises."""
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        return pool.submit(_ask_twice, directory, threads, device).result()


def _ask_twice(directory: Path, threads: int, device: str) -> tuple[float, float]:
    from phisight.conversation import Conversation
    from phisight.loading import load

    model = load(directory, threads=threads, device=device)
    images = []
    if model.manifest.model.images is not None:
        images = [np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)]
    conversation = Conversation(model)
    options = model.options(max_tokens=2, temperature=0)
    seconds = []
    for question, shown in (("What is written in the picture?", images), ("What colour is it?", [])):
        stats = list(conversation.ask(question, shown, options=options))[-1].stats
        assert stats is not None
        seconds.append(stats.preprocess_seconds + stats.encode_seconds + stats.prefill_seconds)
    return seconds[0], seconds[1]
