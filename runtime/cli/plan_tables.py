"""A plan as lines for people, and predictions beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phisight.planner import (
    Rates,
    Variant,
    Workload,
    decode_seconds,
    encode_seconds,
    first_token_seconds,
    predict_memory,
    prefill_seconds,
    step_seconds,
)
from phisight.planner.check import Measured

__all__ = ["check_lines", "check_rows", "plan_lines"]

TIMES, MEMORY = 0.25, 0.10
"""Deviations that a plan aims to stay within."""


def plan_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document of `phisight plan --json`."""
    yield from _head(document)
    yield ""
    columns = (
        f"{'variant':<22}{'files':>10}{'opening':>10}{'memory':>10}{'encode':>10}{'first token':>13}{'tokens/s':>10}"
    )
    target = document["ttft"]
    yield columns + (f"{f'patches in {target:g} s':>17}" if target else "") + "  fits"
    for row in document["variants"]:
        yield _row(row, target)
    if document["vram"] is not None:
        yield from _gpu(document)
    yield ""
    for row in document["variants"]:
        yield f"{row['name']}: {row['command']}"
    yield ""
    yield from _sources(document)


def check_rows(variant: Variant, rates: Rates, asked: Workload, measured: Measured) -> list[dict[str, Any]]:
    """name, unit, predicted, measured, deviation, allowed, within; of what the system or the answer told."""
    config, decoder = variant.config, rates.decoders[variant.decoder]
    step = step_seconds(variant, rates)
    text = measured.positions - asked.images * measured.patches
    work = Workload(text, asked.images, measured.patches, measured.positions + 256)
    memory = predict_memory(variant, work)
    rows: list[tuple[str, str, float, float | None, float]] = [
        ("memory while opening", "bytes", memory.load_peak, measured.load_peak, MEMORY),
        ("memory at most", "bytes", memory.peak, measured.peak, MEMORY),
    ]
    if asked.images:
        seconds = encode_seconds(config, rates.towers[variant.tower], measured.patches)
        rows.append((f"encode {measured.patches} patches", "s", seconds, measured.encode, TIMES))
    prefill = prefill_seconds(config, decoder, measured.positions, step)
    rows += [
        (f"prefill {measured.positions} positions", "s", prefill, measured.prefill, TIMES),
        ("first token", "s", first_token_seconds(variant, rates, work), measured.first_token, TIMES),
        ("decoding step", "s", decode_seconds(variant, rates, measured.past), measured.decode, TIMES),
    ]
    return [
        {
            "name": name,
            "unit": unit,
            "predicted": predicted,
            "measured": found,
            "deviation": predicted / found - 1,
            "allowed": allowed,
            "within": abs(predicted / found - 1) <= allowed,
        }
        for name, unit, predicted, found, allowed in rows
        if found
    ]


def check_lines(rows: Sequence[Mapping[str, Any]], drift: float) -> Iterator[str]:
    """Predictions, what was measured, and which are outside. `drift` is by how much rates changed meanwhile."""
    yield ""
    yield f"{'check':<26}{'predicted':>12}{'measured':>12}{'deviation':>11}"
    for row in rows:
        aim = "" if row["within"] else f"  outside {100 * row['allowed']:.0f} %"
        shown = [f"{row[key] / 2**20:,.0f} MiB" if row["unit"] == "bytes" else f"{row[key]:.3f} s" for key in KEYS]
        yield f"{row['name']:<26}{shown[0]:>12}{shown[1]:>12}{100 * row['deviation']:>+9.0f} %{aim}"
    outside = sum(not row["within"] for row in rows)
    yield f"{len(rows) - outside} of {len(rows)} predictions lie within their aim"
    if drift > 1 + TIMES:
        yield (
            f"the machine's own speed changed by {100 * (drift - 1):.0f} % between the beginning and the end: "
            "times say little until nothing else runs"
        )


KEYS = ("predicted", "measured")


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    machine, asked = document["machine"], document["asked"]
    yield f"memory {machine['memory'] / 1e9:.1f} GB ({machine['memory_source']}), {machine['threads']} threads" + (
        ""
        if machine["read_bytes_per_second"] is None
        else f"; reads {machine['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{machine['integer_operations_per_second'] / 1e9:,.0f} billion integer operations/s (measured)"
    )
    yield (
        f"asked: {asked['images']} pictures of {asked['patches']} patches, {asked['text']} positions of text "
        f"({document['text_source']}), {asked['context']} positions kept"
    )


def _row(row: Mapping[str, Any], target: float | None) -> str:
    def gigabytes(size: int) -> str:
        return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

    def seconds(key: str) -> str:
        value = row[key]
        return "-" if value is None else f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"

    rate = row["tokens_per_second"]
    memory = row["memory"]
    within = row["patches_within_ttft"]
    budget = f"{'-' if within is None else within or 'none':>17}" if target else ""
    return (
        f"{row['name']:<22}{gigabytes(row['file_bytes']):>10}{gigabytes(memory['load_peak']):>10}"
        f"{gigabytes(memory['peak']):>10}{seconds('encode_s'):>10}{seconds('first_token_s'):>13}"
        f"{'-' if rate is None else f'{rate:.2f}':>10}{budget}  {'yes' if row['fits'] else 'no'}: {row['reason']}"
    )


def _gpu(document: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"on a GPU of {document['vram'] / 1e9:.1f} GB (llama.cpp; its speed was not measured and is not told):"
    for row in document["variants"]:
        if (gpu := row["gpu"]) is not None:
            yield f"  {row['name']}: {gpu['layers']} of {gpu['of']} layers, --gpu-layers {gpu['layers']}"


def _sources(document: Mapping[str, Any]) -> Iterator[str]:
    machine, rates = document["machine"], document["rates"]
    yield "files: exact, from the graphs and headers that an export writes" + (
        "; the tokenizer's size is assumed" if document["text_source"] == "assumed" else ""
    )
    yield "memory: reckoned from what each engine keeps of the weights (docs/performance.md)"
    if document["kv"] is not None:
        yield "KV cache: int8 (run with --kv int8), whose times were not measured: they are those of a float one"
    yield f"times: {rates['source']}, on {rates['threads']} threads:"
    for name, entry in rates["decoders"].items():
        reads, computes = 1 / entry["weights"], 1 / entry["matrices"]
        yield (
            f"  {name}: decoding reads {reads / 1e9:.1f} GB/s{_share(reads, machine['read_bytes_per_second'])}, "
            f"prefill {computes / 1e9:,.0f} billion operations/s"
            f"{_share(computes, machine['integer_operations_per_second'])}"
        )
    for name, entry in rates["towers"].items():
        computes = 1 / entry["matrices"]
        yield (
            f"  tower {name}: {computes / 1e9:,.0f} billion operations/s"
            f"{_share(computes, machine['integer_operations_per_second'])}"
        )


def _share(rate: float, bound: float | None) -> str:
    return "" if bound is None else f" ({100 * rate / bound:.0f} % of the bound)"
