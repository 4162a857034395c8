"""How fast a machine runs each kind of weights: seconds for an operation or a byte, measured once, kept as JSON.

They are what a stage really reaches, not what the processor could: see `phisight.bench.bounds` for that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from phisight.errors import InputError

__all__ = ["DecoderRates", "Rates", "TowerRates"]


@dataclass(frozen=True)
class DecoderRates:
    """Seconds an operation in the matrices and in the attention of a prefill; seconds a byte of weights and of KV cache
    in a decoding step."""

    matrices: float
    attention: float
    weights: float
    cache: float

    @property
    def operations_per_second(self) -> float:
        return 1 / self.matrices

    @property
    def bytes_per_second(self) -> float:
        return 1 / self.weights


@dataclass(frozen=True)
class TowerRates:
    """Seconds an operation in the matrices and in the attention of an encoding."""

    matrices: float
    attention: float

    @property
    def operations_per_second(self) -> float:
        return 1 / self.matrices


R = TypeVar("R", DecoderRates, TowerRates)


def _mean(one: R, two: R) -> R:
    halves = {name: (value + getattr(two, name)) / 2 for name, value in asdict(one).items()}
    return type(one)(**halves)


@dataclass(frozen=True)
class Rates:
    """By kind of decoder ("onnx int4 block 32", "gguf q4_0", ...) and of tower ("w8a8", ...), with so many threads.

    `prepare` is seconds a patch from pixels to patches. `source` says where they come from.
    """

    threads: int
    decoders: Mapping[str, DecoderRates]
    towers: Mapping[str, TowerRates]
    prepare: float
    source: str = "measured on small models of random weights"

    def between(self, other: Rates) -> Rates:
        """The mean of two measurements of the same kinds."""
        return Rates(
            self.threads,
            {name: _mean(rates, other.decoders[name]) for name, rates in self.decoders.items()},
            {name: _mean(rates, other.towers[name]) for name, rates in self.towers.items()},
            (self.prepare + other.prepare) / 2,
            self.source,
        )

    def drift(self, other: Rates) -> float:
        """The largest ratio between two measurements of the same matrices, at least 1."""
        pairs = [(rates.matrices, other.decoders[name].matrices) for name, rates in self.decoders.items()]
        pairs += [(rates.matrices, other.towers[name].matrices) for name, rates in self.towers.items()]
        return max(max(one / two, two / one) for one, two in pairs)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Rates:
        """The rates in what `phisight plan --json` wrote. Raises InputError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))["rates"]
            return cls(
                threads=int(data["threads"]),
                decoders={name: DecoderRates(**entry) for name, entry in data["decoders"].items()},
                towers={name: TowerRates(**entry) for name, entry in data["towers"].items()},
                prepare=float(data["prepare"]),
                source=f"measured earlier, from {path}",
            )
        except OSError as error:
            raise InputError(f"--rates {path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"--rates {path} is not what phisight plan --json writes: make it anew") from None
