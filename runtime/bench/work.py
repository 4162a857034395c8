"""How much arithmetic each stage is: multiplications and additions, a product and its addition being two.

Behind the last layer's attention only the positions that get logits are run: one of a prefill's.
"""

from __future__ import annotations

from phisight.config import DecoderConfig, ModelConfig

__all__ = [
    "attention_operations",
    "chunk_operations",
    "encode_operations",
    "prefill_operations",
    "tail_share",
    "tower_attention_operations",
]


def prefill_operations(d: DecoderConfig, positions: int) -> float:
    """In the matrices, for positions run as one chunk; one position is a decoding step's."""
    return chunk_operations(d, positions) + 2.0 * tail_share(d) * _weights(d)


def chunk_operations(d: DecoderConfig, positions: int) -> float:
    """That part of them that every position runs through."""
    return 2.0 * positions * (1 - tail_share(d)) * _weights(d)


def tail_share(d: DecoderConfig) -> float:
    """The share of a step's weights that a chunk's last position alone runs through: the last layer's and the head."""
    rest = d.hidden_size * (d.hidden_size + 3 * d.intermediate_size)
    return (rest + d.hidden_size * d.vocab_size) / _weights(d)


def _weights(d: DecoderConfig) -> int:
    """In the matrices that a decoding step reads."""
    layer = d.hidden_size * (d.qkv_size + d.hidden_size + 3 * d.intermediate_size)
    return d.num_layers * layer + d.hidden_size * d.vocab_size


def attention_operations(d: DecoderConfig, positions: int, past: int) -> float:
    """In attention, for positions behind `past` others, each seeing itself and those before."""
    return 4.0 * d.hidden_size * d.num_layers * positions * (past + positions / 2)


def encode_operations(config: ModelConfig, patches: int) -> float:
    """In the matrices of tower and projector; 0 for a text-only model."""
    v, hidden = config.vision, config.decoder.hidden_size
    if v is None:
        return 0.0
    layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    weights = v.used_layers * layer + hidden * (v.hidden_size + hidden) + v.patch_dim * v.hidden_size
    return 2.0 * patches * weights


def tower_attention_operations(config: ModelConfig, patches: int) -> float:
    """In the tower's attention, every patch seeing all; 0 for a text-only model."""
    v = config.vision
    return 0.0 if v is None else 4.0 * patches**2 * v.hidden_size * v.used_layers
