"""Which group of weights gets which type: the least divergence for so many bytes, or the fewest bytes for so much.

Groups are taken as independent: their divergences add up. Each takes one of a few types, so this is the knapsack
problem with one choice from each class (Kellerer, Pferschy, Pisinger: Knapsack Problems, chapter 11), solved exactly by
dynamic programming over bytes, since sizes of matrices have large common divisors: a table of some ten thousand sums
holds the 15B model. A greedy walk by gain per byte would come near, but leaves what no next step fits into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from phisight.errors import InputError

__all__ = ["Allocation", "Choice", "Frontier"]

MOST_SUMS = 1 << 17
"""Sums of bytes that are told apart. Beyond that bytes are rounded up: a plan then never takes more than it should."""


@dataclass(frozen=True)
class Choice:
    """A type that a group can have: its name, what it takes, and the KL divergence in nats that it alone brings."""

    type: str
    bytes: int
    kld: float


@dataclass(frozen=True)
class Allocation:
    """A choice for each group, by name."""

    choices: Mapping[str, Choice]

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def kld(self) -> float:
        """The sum, which is what all together bring only as far as groups are independent."""
        return sum(choice.kld for choice in self.choices.values())


class Frontier:
    """The best allocation for every number of bytes."""

    def __init__(self, groups: Mapping[str, Sequence[Choice]]) -> None:
        """Each group has one choice or more."""
        self._groups = {
            name: sorted(choices, key=lambda each: (each.bytes, each.kld)) for name, choices in groups.items()
        }
        self._least = sum(choices[0].bytes for choices in self._groups.values())
        extra = [each.bytes - choices[0].bytes for choices in self._groups.values() for each in choices]
        most = sum(choices[-1].bytes - choices[0].bytes for choices in self._groups.values())
        unit = gcd(*extra) or 1
        self._unit = max(unit, -(-most // MOST_SUMS))
        count = sum(self._units(choices, choices[-1]) for choices in self._groups.values()) + 1
        self._best = np.zeros(count)  # least divergence within so many units above the least bytes
        self._taken = np.zeros((len(self._groups), count), np.uint8)
        for row, choices in zip(self._taken, self._groups.values(), strict=True):
            best = np.full(count, np.inf)
            for number, choice in enumerate(choices):
                units = self._units(choices, choice)
                total = np.full(count, np.inf)
                total[units:] = self._best[: count - units] + choice.kld
                better = total < best
                best[better] = total[better]
                row[better] = number
            self._best = best

    def within_bytes(self, limit: float) -> Allocation:
        """The least divergence in at most `limit` bytes. Raises InputError if nothing is that small."""
        if limit < self._least:
            raise InputError(f"the smallest types take {self._least:,} bytes, wanted at most {limit:,.0f}")
        return self._at(min(int(limit - self._least) // self._unit, len(self._best) - 1))

    def within_kld(self, limit: float) -> Allocation:
        """The fewest bytes with a sum of at most `limit`. Raises InputError if nothing is that exact."""
        enough = np.flatnonzero(self._best <= limit)
        if not len(enough):
            raise InputError(f"the most exact types bring a KL divergence of {self._best[-1]:.3g}, wanted {limit:.3g}")
        return self._at(int(enough[0]))

    def _at(self, units: int) -> Allocation:
        chosen = {}
        for number, (name, choices) in reversed(list(enumerate(self._groups.items()))):
            chosen[name] = choices[self._taken[number, units]]
            units -= self._units(choices, chosen[name])
        return Allocation({name: chosen[name] for name in self._groups})

    def _units(self, choices: Sequence[Choice], choice: Choice) -> int:
        return -(-(choice.bytes - choices[0].bytes) // self._unit)
