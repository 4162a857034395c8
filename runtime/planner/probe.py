"""Measuring a small model: the seconds of its stages, and the rates that follow from them.

Each matrix stage is timed at two sizes, or behind two lengths of cache, so that what grows with the square is told from
what does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from phisight.bench.clock import seconds_of
from phisight.bench.contender import Contender, Opened
from phisight.bench.work import (
    attention_operations,
    encode_operations,
    prefill_operations,
    tower_attention_operations,
)
from phisight.child_process import ChildProcess
from phisight.naflex import PATCH_VALUES, Patches, preprocess
from phisight.planner.rates import DecoderRates, TowerRates
from phisight.planner.times import CHUNK

__all__ = ["attention_share", "measure_prepare", "measure_probe"]

PATCHES = 256, 1024
CHUNKS = 3
STEPS = 8
TRIES = 2
SPENT = 0.5
"""Seconds after which nothing is tried again."""
CACHE_RATIO = 1.0, 3.0
"""A byte of the KV cache takes between so many times as long as one of the weights: the difference between two steps of
a small model is often less than what else moves them."""


def measure_probe(contender: Contender, step_bytes: int) -> tuple[DecoderRates, TowerRates | None]:
    """Rates of a contender's decoder, of whose weights a step reads `step_bytes`, and of its tower if it has one.

    In a process of its own. Raises what opening it raises, EngineError.
    """
    with ChildProcess(contender.name, _serve, contender, step_bytes) as process:
        decoder, tower = process.receive()
        return decoder, tower


def measure_prepare() -> float:
    """Seconds a patch from pixels to patches."""
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3)).astype(np.uint8)
    return min(seconds_of(lambda: preprocess(picture, 1024)) for _ in range(TRIES)) / 1024


def attention_share(small: float, large: float, linear: float, square: tuple[float, float]) -> tuple[float, float]:
    """(seconds that grow evenly in the smaller time, seconds for each of `square`'s units).

    The larger time has `linear` times the even work, and `square` units the two have. Where noise has turned them
    round, all is even.
    """
    unit = (large - linear * small) / (square[1] - linear * square[0])
    unit = max(0.0, min(unit, 0.9 * small / square[0] if square[0] else unit))
    return small - unit * square[0], unit


def _serve(pipe: Connection, contender: Contender, step_bytes: int) -> None:
    opened = contender.open()
    pipe.send((_decoder(opened, step_bytes, contender.engine), None if opened.encoder is None else _tower(opened)))


def _decoder(opened: Opened, step_bytes: int, engine: str) -> DecoderRates:
    d, decoder = opened.config.decoder, opened.decoder
    ids = np.random.default_rng(0).integers(0, d.vocab_size, CHUNKS * CHUNK + 2 * STEPS, np.int32)
    decoder.reserve(len(ids))
    decoder.append([ids[:CHUNK]])  # the first run of a size sets memory aside
    firsts: list[float] = []
    lasts: list[float] = []
    started = perf_counter()
    while not firsts or perf_counter() - started < SPENT:
        decoder.truncate(0)
        chunks = [ids[at : at + CHUNK] for at in range(0, CHUNKS * CHUNK, CHUNK)]
        seconds = [seconds_of(partial(decoder.append, [chunk])) for chunk in chunks]
        firsts.append(seconds[0])
        lasts.append(seconds[-1])
    square = attention_operations(d, CHUNK, 0), attention_operations(d, CHUNK, (CHUNKS - 1) * CHUNK)
    _, attention = attention_share(median(firsts), median(lasts), 1.0, square)
    far = _step(opened, ids)
    decoder.truncate(STEPS)
    near = _step(opened, ids)
    cached = d.kv_bytes_per_token(2 if engine == "llama.cpp" else 4) * (CHUNKS * CHUNK - STEPS)
    weights = near / step_bytes
    low, high = (ratio * weights for ratio in CACHE_RATIO)
    cache = min(max((far - near) / cached, low), high)
    # Where all positions get logits, the last layer of a small model is run for all, too.
    whole = _usual(partial(_whole, opened, ids[:CHUNK])) - attention * square[0]
    return DecoderRates(whole / (CHUNK * prefill_operations(d, 1)), attention, weights, cache)


def _whole(opened: Opened, ids: NDArray[np.int32]) -> None:
    """A chunk from an empty cache, all positions of which get logits."""
    opened.decoder.truncate(0)
    opened.decoder.append([ids], "all")


def _step(opened: Opened, ids: NDArray[np.int32]) -> float:
    """Seconds of a step behind what is cached."""
    opened.decoder.append([ids[:1]])
    return median(seconds_of(partial(opened.decoder.append, [ids[i : i + 1]])) for i in range(STEPS))


def _usual(work: Callable[[], object]) -> float:
    """The median of a few tries."""
    started, seconds = perf_counter(), [seconds_of(work)]
    while perf_counter() - started < SPENT:
        seconds.append(seconds_of(work))
    return median(seconds)


def _tower(opened: Opened) -> TowerRates:
    encoder, config = opened.encoder, opened.config
    assert encoder is not None and config.images is not None
    seconds, counts = [], []
    for patches in PATCHES:
        side = max(2, int(min(patches, config.images.max_patches * patches / PATCHES[-1]) ** 0.5))
        values = np.random.default_rng(0).uniform(-1, 1, (side * side, PATCH_VALUES)).astype(np.float32)
        image = Patches(values, (side, side), (16 * side, 16 * side))
        encoder.encode(image)
        seconds.append(_usual(partial(encoder.encode, image)))
        counts.append(side * side)
    small, large = (encode_operations(config, count) for count in counts)
    squares = tower_attention_operations(config, counts[0]), tower_attention_operations(config, counts[1])
    even, attention = attention_share(seconds[0], seconds[1], large / small, squares)
    return TowerRates(even / small, attention)
