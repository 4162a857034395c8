"""Logits become a token.

    logits -> repetition penalty -> allowed tokens -> temperature -> top-k -> min-p -> top-p -> draw

Each filter works on what the one before it kept. At temperature 0 the likeliest token after the penalty is
taken and the filters have no effect. Of equal tokens, the one with the lowest id comes first, everywhere.

The vocabulary is sorted as a whole only if the distribution is so flat that top-p needs thousands of tokens:
a lower bound on the n-th largest value, read from the maxima of disjoint groups, leaves few candidates.
"""

from __future__ import annotations

import math
import secrets
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.errors import EngineError
from phisight.options import GenerateOptions

__all__ = ["Sampler"]

_Values: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

# Draws before the nucleus is made: at the usual top-p of 0.95 the first is good in 19 of 20 cases.
_DRAWS = 4

# Weights that are summed first, to find where a draw falls.
_BLOCK = 512

# Low bits of a float32 that do not count when weights are summed: 16 bits leave sign, exponent and 7 of the fraction.
_SORTED_BITS = 16

# Groups for each value wanted: more of them make the lower bound tighter and its own selection dearer.
_GROUPS_PER_VALUE = 8


class Sampler:
    """Draws tokens for one answer. `seed` is the seed in use, also where the options left it open.

    `drawable`: only ids below it are drawn, where a checkpoint's logits outnumber its tokenizer's tokens; None: all.
    """

    def __init__(self, options: GenerateOptions, vocab_size: int, drawable: int | None = None) -> None:
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._options = options
        self._vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._seen = np.zeros(vocab_size, dtype=np.bool_)  # ids that the repetition penalty applies to
        self._drawable = vocab_size if drawable is None else min(drawable, vocab_size)
        # Made once: fresh arrays of a vocabulary's size cost more than the arithmetic in them.
        self._all_ids = np.arange(self._drawable)
        self._weights = np.empty(self._drawable, dtype=np.float32)
        self._products = np.empty(self._drawable, dtype=np.float32)
        self._doubles = np.empty(self._drawable)
        self._bits = np.empty(self._drawable, dtype=np.int64)

    def observe(self, token_ids: int | NDArray[np.int64]) -> None:
        """Note ids, one or many, of the prompt's text or the answer, for the repetition penalty."""
        self._seen[token_ids] = True

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """Logits, (vocab,) float32 -> token id. The array is only read, and not kept.

        `allowed`: which of the drawable ids may be drawn, as if the others did not exist; None: all.
        Raises EngineError when the logits have another shape or are not all finite, or when no token is allowed.
        """
        ids, scores = self._choices(logits, allowed)
        if self._options.temperature == 0:
            return int(ids[scores.argmax()])
        ids, weights = self._weighted(ids, scores)
        if self._options.top_p < 1:
            # Drawn from all until it falls into the nucleus: the same distribution as a draw from the nucleus, which
            # would have to be made first, at several times the cost.
            total = float(weights.sum(dtype=np.float64))
            for _ in range(_DRAWS):
                place = self._draw(weights)
                if self._before(weights, place) < self._options.top_p * total:
                    return int(ids[place])
            weights *= self._nucleus(weights)
        return int(ids[self._draw(weights)])

    def distribution(
        self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What `sample` draws from: ids (n,) int64, ascending, and their probabilities (n,) float64.

        At temperature 0 it is one token. Raises as `sample`.
        """
        ids, scores = self._choices(logits, allowed)
        if self._options.temperature == 0:
            return ids[[scores.argmax()]], np.ones(1)
        ids, weights = self._weighted(ids, scores)
        if self._options.top_p < 1:
            weights *= self._nucleus(weights)
        kept = np.flatnonzero(weights)
        return ids[kept], weights[kept] / weights.sum(dtype=np.float64)

    def _choices(
        self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids that may be drawn, ascending, and their logits under the penalty."""
        scores = self._penalised(logits)
        if allowed is None:
            return self._all_ids, scores
        ids = np.flatnonzero(allowed[: self._drawable])
        if not len(ids):
            raise EngineError("no token may be drawn: the constraint allows none that the model has")
        return ids, scores[ids]

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of the drawable ids under the penalty of CTRL (Keskar et al. 2019).

        It is taken in the usual form that also handles negative logits.
        """
        if logits.shape != (self._vocab_size,):
            raise EngineError(f"the logits have shape {logits.shape}: expected ({self._vocab_size},)")
        if not (np.isfinite(logits.min()) and np.isfinite(logits.max())):  # which pass NaN on
            count = int(np.count_nonzero(~np.isfinite(logits)))
            raise EngineError(
                f"{count} of {logits.size} logits are NaN or infinite: the engine's arithmetic overflowed or "
                "the weights are damaged; verify the model directory, or use one exported with float32 activations"
            )
        logits = logits[: self._drawable]
        penalty = self._options.repetition_penalty
        if penalty == 1:
            return logits
        seen = np.flatnonzero(self._seen[: self._drawable])
        values = logits[seen].astype(np.float64)
        with np.errstate(over="ignore"):
            penalised = np.where(values > 0, values / penalty, values * penalty)
        limit = np.finfo(np.float32).max  # an extreme penalty must not make infinities
        scores = logits.copy()
        scores[seen] = np.clip(penalised, -limit, limit)
        return scores

    def _weighted(
        self, ids: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates' ids, ascending, and their weights: 1 for the likeliest token, 0 for what min-p drops.

        What is dropped last keeps its place: new arrays of a vocabulary's size would cost more than the arithmetic.
        """
        options = self._options
        top, places = scores.max(), None
        if options.top_k is not None and options.top_k < len(scores):
            places = _largest(scores, options.top_k)
        elif options.min_p > 0:  # leaves few weights to compute; half a unit of margin hides the rounding
            floor = float(top) + (math.log(options.min_p) - 0.5) * options.temperature
            places = np.flatnonzero(scores >= max(floor, float(np.finfo(np.float32).min)))
        if places is not None and len(places) < len(scores):
            ids, scores = ids[places], scores[places]
        weights = self._weights[: len(scores)]
        with np.errstate(over="ignore", under="ignore"):  # at extreme temperatures 0 and infinity are right
            np.subtract(scores, top, out=weights)
            weights /= max(np.float32(options.temperature), np.finfo(np.float32).tiny)
            np.exp(weights, out=weights)
        if options.min_p > 0:
            weights *= weights >= options.min_p
        return ids, weights

    def _draw(self, weights: NDArray[np.float32]) -> int:
        """A place with a probability in proportion to its weight: first a block, then a place in it."""
        blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
        block, rest = self._pick(blocks)
        start = block * _BLOCK
        place, _ = self._pick(weights[start : start + _BLOCK].astype(np.float64), rest)
        return start + place

    def _pick(self, weights: NDArray[np.float64], mark: float | None = None) -> tuple[int, float]:
        """The first place at which the sum exceeds `mark`, a random one if None, and what is left of it there."""
        cumulated = np.cumsum(weights)
        if mark is None:
            mark = self._random.random() * cumulated[-1]
        mark = min(mark, np.nextafter(cumulated[-1], 0))  # rounding may reach the total, where nothing has a weight
        place = int(np.searchsorted(cumulated, mark, side="right"))
        return place, float(mark - (cumulated[place - 1] if place else 0.0))

    def _before(self, weights: NDArray[np.float32], place: int) -> float:
        """The sum of the weights before the one at `place` in falling order, equal ones in the order of places."""
        weight = weights[place]
        larger = np.multiply(weights, weights > weight, out=self._products[: len(weights)])
        return float(larger.sum(dtype=np.float64)) + float(weight) * np.count_nonzero(weights[:place] == weight)

    def _nucleus(self, weights: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which are the largest weights whose sum first reaches top_p of the total; of equal ones the first.

        Positive floats order as their bits do: the weights are summed by their leading bits, and only those that share
        these with the last one kept are sorted. The cost is the same for a peaked and for a flat distribution.
        """
        leading, doubles = self._bits[: len(weights)], self._doubles[: len(weights)]
        np.right_shift(weights.view(np.int32), _SORTED_BITS, out=leading)
        np.copyto(doubles, weights)  # bincount would make copies of its own, in fresh memory
        mass = np.bincount(leading, doubles)
        from_top = np.cumsum(mass[::-1])
        wanted = self._options.top_p * from_top[-1]
        place = int(np.searchsorted(from_top, wanted))
        last = len(mass) - 1 - place
        shared = np.flatnonzero(leading == last)
        shared = shared[np.argsort(-weights[shared], kind="stable")]
        before = from_top[place - 1] if place else 0.0
        count = int(np.searchsorted(np.cumsum(weights[shared], dtype=np.float64), wanted - before)) + 1
        kept = leading > last
        kept[shared[:count]] = True
        return kept


def _largest(values: _Values, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, ascending; of equal values the first ones."""
    candidates = _candidates(values, count)
    among = values[candidates]
    smallest = np.partition(among, -count)[-count]
    above = candidates[among > smallest]
    equal = candidates[among == smallest][: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _candidates(values: _Values, count: int) -> NDArray[np.int64]:
    """Indices, ascending, of a superset of the `count` largest values and of all that equal the last of them.

    Each of `groups` disjoint groups has its maximum among the values, so the count-th largest maximum is a
    lower bound on the count-th largest value.
    """
    groups = count * _GROUPS_PER_VALUE
    rows = len(values) // groups
    if rows < 2:
        return np.arange(len(values))
    maxima = values[: rows * groups].reshape(rows, groups).max(axis=0)
    return np.flatnonzero(values >= np.partition(maxima, -count)[-count])
