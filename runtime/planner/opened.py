"""Rates of a model that is open, measured through it in a moment, and the budget of patches that follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from phisight.bench.clock import seconds_of
from phisight.bench.work import encode_operations, prefill_operations, tower_attention_operations
from phisight.disk_cache import DiskCache
from phisight.model import Model
from phisight.model_cache import CacheIdentity
from phisight.naflex import PATCH_VALUES, Patches
from phisight.planner.budget import BudgetChoice, choose_patches
from phisight.planner.probe import attention_share
from phisight.planner.rates import DecoderRates, TowerRates
from phisight.planner.times import CHUNK, Workload, encode_seconds, prefill_seconds

__all__ = ["OpenedRates", "budget_of", "measure_opened", "rates_of"]

FEW_POSITIONS = 64
"""Run first; a whole chunk too where they take less than a second."""
QUICK_SECONDS = 1.0
PATCHES = 256, 1024
SLOW_SECONDS = 3.0
"""Of the smaller picture, after which the larger one is not waited for."""
ATTENTION = 2.0
"""Assumed of an operation in the decoder's attention, beside one in its matrices: it is a tenth of a long prefill."""
TRIES = 2


@dataclass(frozen=True)
class OpenedRates:
    """Seconds an operation in the decoder's matrices, in the tower's, and in the tower's attention."""

    prefill: float
    encode: float
    tower_attention: float

    def first_token(self, model: Model, work: Workload) -> float:
        """Predicted seconds to the first token of a question."""
        config = model.manifest.model
        tower = TowerRates(self.encode, self.tower_attention)
        decoder = DecoderRates(self.prefill, ATTENTION * self.prefill, 0.0, 0.0)
        images = work.images * encode_seconds(config, tower, work.patches)
        return images + prefill_seconds(config, decoder, work.prompt, 0.0)


def budget_of(model: Model, rates: OpenedRates, *, text: int, images: int, target: float) -> BudgetChoice:
    """The most patches of each of `images` pictures beside `text` positions.

    Raises InputError where even the fewest take longer, ImageError for a text-only model.
    """

    def predict(patches: int) -> float:
        return rates.first_token(model, Workload(text, images, patches, 0))

    return choose_patches(predict, model.budget.min_patches, model.budget.max_patches, target)


def rates_of(model: Model, disk: DiskCache | None, identity: CacheIdentity, threads: int) -> OpenedRates:
    """Kept ones, or those measured now, which are kept if that took long enough. Raises as `measure_opened`."""
    key = f"rates {identity.place} {threads}"
    kept = None if disk is None else disk.read(key, identity.stamp)
    if kept is not None:
        return OpenedRates(**json.loads(bytes(kept)))
    found: list[OpenedRates] = []
    seconds = seconds_of(lambda: found.append(measure_opened(model)))
    if disk is not None:
        disk.write(key, json.dumps(asdict(found[0])).encode(), seconds, identity.stamp)
    return found[0]


def measure_opened(model: Model) -> OpenedRates:
    """Encode two pictures and prefill some positions. Raises ImageError for a text-only model, EngineError."""
    config, most = model.manifest.model, model.budget.max_patches
    counts = [max(2, int(min(patches, most * patches / PATCHES[-1]) ** 0.5)) ** 2 for patches in PATCHES]
    small = _best(partial(_encode, model, counts[0]))
    operations = encode_operations(config, counts[0])
    squares = tower_attention_operations(config, counts[0]), tower_attention_operations(config, counts[1])
    if small < SLOW_SECONDS:
        ratio = encode_operations(config, counts[1]) / operations
        even, attention = attention_share(small, _best(partial(_encode, model, counts[1])), ratio, squares)
    else:
        attention = small / (operations + squares[0])
        even = small - attention * squares[0]
    prefill = _prefill(model, FEW_POSITIONS)
    positions = FEW_POSITIONS
    if prefill < QUICK_SECONDS and model.context > CHUNK:
        prefill, positions = min(_prefill(model, CHUNK) for _ in range(TRIES)), CHUNK
    return OpenedRates(prefill / prefill_operations(config.decoder, positions), even / operations, attention)


def _best(work: Callable[[int], object]) -> float:
    """The least of two tries if the first is quick: it also sets memory aside."""
    first = seconds_of(partial(work, 0))
    return min(first, *(seconds_of(partial(work, seed)) for seed in range(1, 1 + TRIES))) if first < 1 else first


def _encode(model: Model, patches: int, seed: int) -> None:
    side = round(patches**0.5)
    values = np.random.default_rng([seed, patches]).uniform(-1, 1, (patches, PATCH_VALUES)).astype(np.float32)
    model.encode_image(Patches(values, (side, side), (16 * side, 16 * side)))


def _prefill(model: Model, positions: int) -> float:
    ids = np.random.default_rng().integers(0, min(256, model.tokenizer.vocab_size), positions)
    generation = model.generate_tokens(ids, options=model.options(max_tokens=1, temperature=0))
    for _ in generation:
        pass
    return generation.timings.prefill_seconds * positions / generation.timings.prefill_positions
