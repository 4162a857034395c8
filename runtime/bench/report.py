"""Medians, ratios, shares of the bounds, and what the full depth would take, of what was timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from phisight.bench.bounds import Bounds
from phisight.bench.contender import Contender
from phisight.bench.rounds import Samples
from phisight.bench.stages import Stage
from phisight.config import ModelConfig

__all__ = ["as_report", "full_depth"]

COMPUTED = ("encode", "prefill", "prefill_image")
"""Kinds that arithmetic bounds; memory bounds decoding."""


def as_report(
    stages: Sequence[Stage],
    contenders: Sequence[Contender],
    deep: Samples,
    shallow: Samples | None,
    depths: Mapping[str, tuple[int, int, int]],
    bounds: Bounds,
    decode_bytes: int,
) -> dict[str, Any]:
    """The document of `phisight bench --json`, of the stages that were timed.

    The first contender is ours, the second the other engine as it comes, and all but the first are its settings; those
    with other weights than ours are told apart, as `other_weights`.
    `depths` are layers deep, shallow and at full depth, for "encode" and for the decoder's stages; `shallow` None
    extrapolates nothing, nor do times that a busy machine turned round. `decode_bytes` is what a
    decoding step reads of our files.
    """
    rows = {}
    for stage in stages:
        medians = {
            c.name: statistics.median(deep.of(stage.name, c.name)) for c in contenders if deep.of(stage.name, c.name)
        }
        if not medians:
            continue
        ours = contenders[0].name
        others = [c.name for c in contenders[1:] if c.same_weights and c.name in medians]
        row = _compared(medians, ours, others)
        if different := [c.name for c in contenders if not c.same_weights and c.name in medians]:
            row["other_weights"] = {name: medians[name] for name in different}
        samples = deep.of(stage.name, ours)
        row["spread"] = (max(samples) - min(samples)) / medians[ours]
        if stage.kind in (*COMPUTED, "decode"):
            row["units_per_second"] = stage.timed_units / medians[ours]
            row |= _share(stage, contenders[0].config, medians[ours], bounds, decode_bytes)
        row["extrapolated"] = None
        if shallow is not None and stage.kind in (*COMPUTED, "decode"):
            kind = "encode" if stage.kind == "encode" else "decoder"
            times = {name: (medians[name], statistics.median(shallow.of(stage.name, name))) for name in (ours, *others)}
            # Where fewer layers took longer the machine was busy, and no layer's time is known.
            if all(deeper > less for deeper, less in times.values()):
                full = {name: full_depth(pair, depths[kind]) for name, pair in times.items()}
                row["extrapolated"] = {"layers": depths[kind][2], **_compared(full, ours, others)}
        rows[stage.name] = row
    return {
        "stages": rows,
        "contenders": [c.settings() for c in contenders],
        "memory": {name: figures.peak_bytes for name, figures in deep.figures.items()},
        "bounds": {
            "threads": bounds.threads,
            "read_bytes_per_second": bounds.read_rate,
            f"{bounds.products}_operations_per_second": bounds.product_rate,
        },
    }


def full_depth(times: tuple[float, float], depths: tuple[int, int, int]) -> float:
    """Seconds at the third depth, from those at the first two: a layer's time each, and all else once."""
    deep, shallow, wanted = depths
    layer = (times[0] - times[1]) / (deep - shallow)
    return times[0] + (wanted - deep) * layer


def _compared(seconds: Mapping[str, float], ours: str, others: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"ours_s": seconds[ours], "other_default_s": None, "other_s": None}
    row |= {"ratio_default": None, "ratio": None, "other_best": None}
    if others:
        best = min(others, key=lambda name: seconds[name])
        row |= {"other_default_s": seconds[others[0]], "other_s": seconds[best], "other_best": best}
        row |= {"ratio_default": seconds[others[0]] / seconds[ours], "ratio": seconds[best] / seconds[ours]}
        row["others"] = {name: seconds[name] for name in others}
    return row


def _share(stage: Stage, config: ModelConfig, seconds: float, bounds: Bounds, decode_bytes: int) -> dict[str, Any]:
    if stage.kind == "decode":
        return {"bound": "memory", "bound_s": decode_bytes / bounds.read_rate} | {
            "share": decode_bytes / bounds.read_rate / seconds
        }
    ideal = stage.operations(config) / bounds.product_rate
    return {"bound": f"{bounds.products} products", "bound_s": ideal, "share": ideal / seconds}
