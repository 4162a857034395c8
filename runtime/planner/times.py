"""Seconds of each stage, from the work that it is and the rates that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from phisight.bench.work import (
    attention_operations,
    chunk_operations,
    encode_operations,
    tail_share,
    tower_attention_operations,
)
from phisight.config import ModelConfig
from phisight.planner.rates import DecoderRates, Rates, TowerRates
from phisight.planner.variant import Variant

__all__ = [
    "CHUNK",
    "Workload",
    "decode_seconds",
    "encode_seconds",
    "first_token_seconds",
    "prefill_seconds",
    "step_seconds",
]

CHUNK = 256
"""Positions of a prefill that are run at once."""


@dataclass(frozen=True)
class Workload:
    """What is asked: positions of text, images, patches of each; and how many positions are kept in all."""

    text: int
    images: int
    patches: int
    context: int

    @property
    def prompt(self) -> int:
        """Positions before the first token."""
        return self.text + self.images * self.patches


def encode_seconds(config: ModelConfig, rates: TowerRates, patches: int) -> float:
    """Of one image."""
    return (
        encode_operations(config, patches) * rates.matrices
        + tower_attention_operations(config, patches) * rates.attention
    )


def step_seconds(variant: Variant, rates: Rates) -> float:
    """Of a decoding step with next to nothing cached: all weights of the decoder are read once."""
    layers = rates.decoders[variant.decoder]
    head = rates.decoders.get(variant.head, layers)
    return variant.layer_bytes * layers.weights + variant.head_bytes * head.weights


def prefill_seconds(config: ModelConfig, rates: DecoderRates, positions: int, step: float, chunk: int = CHUNK) -> float:
    """Of so many positions from an empty cache.

    A decoding step takes `step` seconds: so long at least for the weights of a chunk, and what only the last position
    runs through as in a step.
    """
    total, tail = 0.0, tail_share(config.decoder) * step
    for past in range(0, positions, chunk):
        count = min(chunk, positions - past)
        total += max(chunk_operations(config.decoder, count) * rates.matrices, step - tail) + tail
        total += attention_operations(config.decoder, count, past) * rates.attention
    return total


def decode_seconds(variant: Variant, rates: Rates, past: int) -> float:
    """Of one step behind `past` positions."""
    cache = rates.decoders[variant.decoder].cache
    return step_seconds(variant, rates) + past * variant.kv_bytes_per_token * cache


def first_token_seconds(variant: Variant, rates: Rates, work: Workload) -> float:
    """From a question with images to its first token, with the model open and nothing cached."""
    images = 0.0
    if work.images:
        images = encode_seconds(variant.config, rates.towers[variant.tower], work.patches)
        images += work.patches * rates.prepare
    decoder = rates.decoders[variant.decoder]
    return work.images * images + prefill_seconds(variant.config, decoder, work.prompt, step_seconds(variant, rates))
