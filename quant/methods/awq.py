"""AWQ: input channels scaled before weights are rounded, so that those of large inputs lose less. Lin et al.,
https://arxiv.org/abs/2306.00978.

A linear layer with inputs x is the same as one with weights `W s` and inputs `x / s`, s a scale per channel. Where x
comes from a norm or another linear layer, `1 / s` can be folded into that, which the exporter does. The scales are
`s = m^a / w^b`, m the root mean square of each channel's inputs, w the mean magnitude of its weights relative to the
largest of their blocks; a and b come from a grid and minimise the layer's output error. The weights `W s` are then
quantised for the statistics of `x / s`: by `Awq`, with the ends of each block clipped as far as that lessens the
block's error, or by GPTQ.

What is quantised with a search of block scales must be judged with one: it makes up for much of what plain rounding
loses to unequal channels, so plain rounding wants scales that are too strong. On the built-in model this judge took
another 8 % off the KL divergence of plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.quant.blocks import dequantize_blocks, split_blocks
from phisight.quant.methods.base import InputStatistics, Method, row_errors
from phisight.quant.methods.search import ScaleSearch, ScaleSearcher
from phisight.quant.scheme import BlockScheme

__all__ = ["Awq", "ChannelScales", "search_channel_scales"]

Floats = NDArray[np.float32]

COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
FINE = (0.125, 0.0625)
"""Exponents that are tried first, and then on both sides of the best."""
SAMPLE = 256
"""Rows of each matrix on which scales are judged: spread evenly, they say what all of them would."""
LEAST_SCALE = 1e-4
"""A channel without inputs would get a scale of zero."""


@dataclass(frozen=True)
class Awq(Method):
    """What follows the scaling: the clipping search, on the Hessian within each block, or on the second moments."""

    name: str = "awq"

    def prepare(self, scheme: BlockScheme, statistics: InputStatistics | None) -> ScaleSearcher:
        correlated = statistics is not None and statistics.hessian is not None
        return ScaleSearch(correlated).prepare(scheme, statistics)


@dataclass(frozen=True)
class ChannelScales:
    """`scale` (columns,) float32: weights are multiplied by it, inputs divided.

    `exponent` is a of `s = m^a / w^b`, `by_weights` says whether b is `1 - a` or zero; `error` is the objective with
    these scales and `plain_error` without, over the sampled rows.
    """

    scale: Floats
    exponent: float
    by_weights: bool
    error: float
    plain_error: float


def search_channel_scales(
    weights: Sequence[Floats],
    scheme: BlockScheme,
    statistics: InputStatistics,
    method: Method | None = None,
    sample: int = SAMPLE,
    admit: Callable[[Floats], Floats] = lambda scale: scale,
) -> ChannelScales:
    """The scales for all the matrices (rows, columns) float32 that share the inputs.

    `method`, one that needs no Hessian, quantises each candidate: the search of block scales unless given. `admit`
    makes of a candidate one that can be folded, such as one with equal scales for channels of the same origin. The
    scales are all one, with exponent 0, if none lessens the error. The error is that of the Hessian if there is one,
    else that of the second moments.
    Raises InputError for weights and statistics of different columns, CheckpointError as `quantize_blocks`.
    """
    columns = {matrix.shape[1] for matrix in weights} | {statistics.columns}
    if len(columns) != 1:
        raise InputError(f"awq: weights and statistics of {sorted(columns)} columns, wanted the same number")
    method = method or ScaleSearch()
    samples = [matrix[:: -(-len(matrix) // sample)] for matrix in weights]
    one = np.ones(statistics.columns, np.float32)
    plain = _error(samples, one, scheme, statistics, method)
    best = ChannelScales(one, 0.0, False, plain, plain)
    inputs = np.sqrt(statistics.second_moment.astype(np.float64))
    largest = _relative_largest(samples, scheme)

    def better(best: ChannelScales, exponent: float, by_weights: bool) -> ChannelScales:
        if not 0 <= exponent <= 1:
            return best
        scale = admit(_normalized(inputs**exponent / (largest ** (1 - exponent) if by_weights else 1.0)))
        error = _error(samples, scale, scheme, statistics, method)
        return ChannelScales(scale, exponent, by_weights, error, plain) if error < best.error else best

    for by_weights in (False, True):
        for exponent in COARSE[0 if by_weights else 1 :]:
            best = better(best, exponent, by_weights)
    for step in FINE:
        centre = best
        for exponent in (centre.exponent - step, centre.exponent + step):
            best = better(best, exponent, centre.by_weights)
    return best


def _error(
    samples: list[Floats], scale: Floats, scheme: BlockScheme, statistics: InputStatistics, method: Method
) -> float:
    """The layer's output error. `W s` is quantised for inputs `x / s`; over s, its error is one of W for inputs x."""
    moments = InputStatistics(statistics.second_moment, None, statistics.count).scaled(np.reciprocal(scale))
    total = 0.0
    for matrix in samples:
        blocks = method.quantize(matrix * scale, scheme, moments)
        total += float(row_errors(matrix, dequantize_blocks(blocks) / scale, statistics).sum())
    return total


def _relative_largest(samples: list[Floats], scheme: BlockScheme) -> NDArray[np.float64]:
    """The mean over rows of each channel's magnitude relative to the largest of its block, (columns,)."""
    total = np.zeros(samples[0].shape[1], np.float64)
    for matrix in samples:
        blocks = np.abs(split_blocks(matrix, scheme))
        largest = blocks.max(axis=-1, keepdims=True)
        relative = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0)
        total += relative.sum(axis=0, dtype=np.float64).reshape(-1)[: len(total)]
    return np.maximum(total / sum(len(matrix) for matrix in samples), LEAST_SCALE)


def _normalized(scale: NDArray[np.float64]) -> Floats:
    """About one: the largest and the smallest scale are each other's inverse, as in the authors' code."""
    scale = np.maximum(scale, LEAST_SCALE)
    normalized: Floats = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
    return normalized
