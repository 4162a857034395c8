"""How far one distribution over the vocabulary is from another, position by position and over all of them.

    logits of both (positions, vocab) + the right token of each position -> Positions -> Divergence

The figures and their standard errors are those of llama.cpp's llama-perplexity --kl-divergence
(https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp), so that they stand beside published
ones. Its errors take positions as independent; within an answer they are not quite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phisight.errors import EngineError

__all__ = ["Divergence", "Positions", "log_softmax", "positions_of"]

BLOCK_BYTES = 32 << 20
"""Of one array in float64: the real vocabulary takes 0.8 MB a position."""


@dataclass(frozen=True, eq=False)
class Positions:
    """What is kept of each position, (positions,) each.

    kld: KL divergence of the variant from the reference in nats. same_top1: whether both find the same token likeliest.
    reference, variant: log-probability of the right token.
    """

    kld: NDArray[np.float64]
    same_top1: NDArray[np.bool_]
    reference: NDArray[np.float64]
    variant: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.kld)

    @classmethod
    def joined(cls, parts: Iterable[Positions]) -> Positions:
        """One after the other. Raises ValueError if there are none."""
        parts = list(parts)
        return cls(
            np.concatenate([part.kld for part in parts]),
            np.concatenate([part.same_top1 for part in parts]),
            np.concatenate([part.reference for part in parts]),
            np.concatenate([part.variant for part in parts]),
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Positions:
        return cls(
            np.array(data["kld"], np.float64),
            np.array(data["same_top1"], np.bool_),
            np.array(data["reference"], np.float64),
            np.array(data["variant"], np.float64),
        )

    def as_json(self) -> dict[str, Any]:
        """Lists of numbers; Python writes each so that it is read back exactly."""
        return {
            "kld": self.kld.tolist(),
            "same_top1": self.same_top1.tolist(),
            "reference": self.reference.tolist(),
            "variant": self.variant.tolist(),
        }


@dataclass(frozen=True)
class Divergence:
    """Positions summed up.

    kld_*: mean with its standard error, median, quantiles and largest, in nats. same_top1: share.
    right_token_*: mean and root mean square of the change of the right token's probability, variant - reference.
    ppl_ratio: perplexity of the variant over that of the reference on the right tokens, with its standard error.
    """

    positions: int
    kld_mean: float
    kld_error: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top1: float
    right_token_mean: float
    right_token_rms: float
    ppl_reference: float
    ppl_variant: float
    ppl_ratio: float
    ppl_ratio_error: float

    @classmethod
    def of(cls, positions: Positions) -> Divergence:
        """Raises ValueError if there are no positions."""
        kld = positions.kld
        if not len(kld):
            raise ValueError("there are no positions to sum up")
        change = np.exp(positions.variant) - np.exp(positions.reference)
        surplus = positions.reference - positions.variant  # of the negative log-likelihood
        ratio = _exp(float(surplus.mean()))
        median, p99, p999 = np.quantile(kld, [0.5, 0.99, 0.999]).tolist()
        return cls(
            positions=len(kld),
            kld_mean=float(kld.mean()),
            kld_error=_standard_error(kld),
            kld_median=median,
            kld_p99=p99,
            kld_p999=p999,
            kld_max=float(kld.max()),
            same_top1=float(positions.same_top1.mean()),
            right_token_mean=float(change.mean()),
            right_token_rms=math.sqrt(float(np.square(change).mean())),
            ppl_reference=_exp(-float(positions.reference.mean())),
            ppl_variant=_exp(-float(positions.variant.mean())),
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * _standard_error(surplus),
        )

    def as_json(self) -> dict[str, Any]:
        """As in a report: see `phisight.compare.report`."""
        return {
            "positions": self.positions,
            "kld": {
                "mean": self.kld_mean,
                "error": self.kld_error,
                "median": self.kld_median,
                "p99": self.kld_p99,
                "p999": self.kld_p999,
                "max": self.kld_max,
            },
            "same_top1": self.same_top1,
            "right_token": {"mean": self.right_token_mean, "rms": self.right_token_rms},
            "ppl": self.ppl_variant,
            "ppl_ratio": self.ppl_ratio,
            "ppl_ratio_error": self.ppl_ratio_error,
        }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(..., vocab) -> (..., vocab), in float64: a KL divergence of 1e-6 is a difference of far larger numbers."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def positions_of(reference: NDArray[np.float32], variant: NDArray[np.float32], targets: ArrayLike) -> Positions:
    """Logits of both, (positions, vocab) float32, and the right token of each position, (positions,).

    `reference` may be a mapped file: it is read some rows at a time. Raises EngineError for logits that are not finite,
    ValueError for shapes that do not fit.
    """
    right = np.asarray(targets, np.int64)
    if reference.shape != variant.shape or reference.ndim != 2 or right.shape != reference.shape[:1]:
        raise ValueError(f"logits of {reference.shape} and {variant.shape} with {right.shape} right tokens do not fit")
    rows = max(BLOCK_BYTES // (8 * max(reference.shape[1], 1)), 1)
    return Positions.joined(
        _block(reference[at : at + rows], variant[at : at + rows], right[at : at + rows])
        for at in range(0, max(len(reference), 1), rows)
    )


def _block(reference: NDArray[np.float32], variant: NDArray[np.float32], right: NDArray[np.int64]) -> Positions:
    for name, logits in (("reference", reference), ("variant", variant)):
        if not np.isfinite(logits).all():
            raise EngineError(f"the {name}'s logits are not all finite: its weights or its engine are damaged")
    p, q = log_softmax(reference), log_softmax(variant)
    # The divergence is never negative; its sum of rounded terms may be, by 1e-16.
    kld = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    place = np.arange(len(right))
    same: NDArray[np.bool_] = reference.argmax(axis=-1) == variant.argmax(axis=-1)
    return Positions(kld, same, p[place, right], q[place, right])


def _standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean; 0 for a single value."""
    return math.sqrt(float(values.var(ddof=1)) / len(values)) if len(values) > 1 else 0.0


def _exp(value: float) -> float:
    """Where a variant gives the right token next to no probability, the largest float instead of an overflow."""
    return math.exp(min(value, 709.0))
