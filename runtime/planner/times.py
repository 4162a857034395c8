"""Seconds of each stage, from the work that it is and the rates that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from phisight.bench.work import (
    attention_operations,
    encode_operations,
    prefill_operations,
    tower_attention_operations,
)
from phisight.config import ModelConfig
from phisight.planner.rates import DecoderRates, Rates, TowerRates

__all__ = ["CHUNK", "Workload", "decode_seconds", "encode_seconds", "first_token_seconds", "prefill_seconds"]

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


def prefill_seconds(
    config: ModelConfig, rates: DecoderRates, positions: int, step_bytes: int, chunk: int = CHUNK
) -> float:
    """Of so many positions from an empty cache. A chunk reads all weights, `step_bytes`, at least once."""
    total = 0.0
    for past in range(0, positions, chunk):
        count = min(chunk, positions - past)
        matrices = prefill_operations(config.decoder, count) * rates.matrices
        total += max(matrices, step_bytes * rates.weights)
        total += attention_operations(config.decoder, count, past) * rates.attention
    return total


def decode_seconds(rates: DecoderRates, step_bytes: int, kv_bytes_per_token: int, past: int) -> float:
    """Of one step behind `past` positions."""
    return step_bytes * rates.weights + past * kv_bytes_per_token * rates.cache


def first_token_seconds(
    config: ModelConfig, decoder: DecoderRates, rates: Rates, tower: str, work: Workload, step_bytes: int
) -> float:
    """From a question with images to its first token, with the model open and nothing cached."""
    images = 0.0
    if work.images:
        images = encode_seconds(config, rates.towers[tower], work.patches) + work.patches * rates.prepare
    return work.images * images + prefill_seconds(config, decoder, work.prompt, step_bytes)
