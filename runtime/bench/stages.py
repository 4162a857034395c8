"""The stages that can be timed, and how much work each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phisight.bench.work import (
    attention_operations,
    encode_operations,
    prefill_operations,
    tower_attention_operations,
)
from phisight.config import ModelConfig
from phisight.errors import InputError

__all__ = ["STAGES", "Kind", "Stage", "stages_named"]

Kind = Literal["encode", "prefill", "prefill_image", "decode", "load", "second_question"]


@dataclass(frozen=True)
class Stage:
    """A stage: `units` are patches to encode, positions to prefill, or steps to decode; 1 for all else.

    A decoding stage's time is that of one step, any other's that of all its units.
    """

    name: str
    kind: Kind
    units: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image of so many patches, a square."""
        side = round(self.units**0.5)
        return side, side

    @property
    def timed_units(self) -> int:
        """Units in the time told."""
        return 1 if self.kind == "decode" else self.units

    def operations(self, config: ModelConfig) -> float:
        """Multiplications and additions of matrices and attention in the time told; 0 where neither is timed."""
        n = self.units
        if self.kind == "encode":
            return encode_operations(config, n) + tower_attention_operations(config, n)
        if self.kind in ("prefill", "prefill_image"):
            return prefill_operations(config.decoder, n) + attention_operations(config.decoder, n, 0)
        return prefill_operations(config.decoder, 1) if self.kind == "decode" else 0.0


STAGES = (
    Stage("encode_256", "encode", 256),
    Stage("encode_1024", "encode", 1024),
    Stage("encode_3600", "encode", 3600),
    Stage("prefill", "prefill", 512),
    Stage("prefill_image", "prefill_image", 512),
    Stage("decode", "decode", 16),
    Stage("second_question", "second_question"),
    Stage("load", "load"),
)


def stages_named(names: str | None) -> tuple[Stage, ...]:
    """Those of a list with commas, in the usual order; None means all. Raises InputError for an unknown name."""
    if names is None:
        return STAGES
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {stage.name for stage in STAGES}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InputError(
            f"stages are {', '.join(unknown) or 'none'}, wanted some of {', '.join(s.name for s in STAGES)}"
        )
    return tuple(stage for stage in STAGES if stage.name in wanted)
