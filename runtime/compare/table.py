"""A report as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["table_lines"]

MOST_NAME = 40
MOST_COLUMNS = 5


def table_lines(report: dict[str, Any]) -> Iterator[str]:
    """A header and a line for each variant; then what its stages bring."""
    variants = report["variants"]
    width = min(max([len(each["name"]) for each in variants] + [len("variant")]), MOST_NAME)
    timed = any(each["speed"] for each in variants)
    yield (
        f"{'variant':<{width}}{'MB':>10}{'bits':>7}{'KLD mean':>11}{'99 %':>10}{'max':>9}{'same top-1':>12}"
        f"{'right prob.':>13}{'PPL ratio':>20}{'right':>9}" + (f"{'decode':>11}{'peak':>10}" if timed else "")
    )
    for each in variants:
        kld, name = each["kld"], _short(each["name"], width)
        ratio = f"{each['ppl_ratio']:.4f} +- {each['ppl_ratio_error']:.4f}"
        yield (
            f"{name:<{width}}{each['bytes'] / 1e6:>10,.1f}{each['bpw']:>7.2f}{kld['mean']:>11.2e}"
            f"{kld['p99']:>10.2e}{kld['max']:>9.1e}{_percent(each['same_top1']):>12}"
            f"{_percent(each['right_token']['rms']):>13}{ratio:>20}{_percent(each['score']):>9}"
            + (f"{_rate(each['speed']):>11}{_memory(each['speed']):>10}" if timed else "")
        )
    for row in report["absent"]:
        yield f"{row['name']}: absent, {row['reason']}" + (f": {row['install']}" if row["install"] else "")
    staged = [each for each in variants if each["stages"]]
    if staged:
        stages = list(staged[0]["stages"])
        yield ""
        yield "mean KLD that one stage brings"
        for at in range(0, len(staged), MOST_COLUMNS):
            shown = staged[at : at + MOST_COLUMNS]
            columns = [max(len(each["name"][:MOST_NAME]), 8) + 2 for each in shown]
            pairs = list(zip(shown, columns, strict=True))
            yield f"{'':<12}" + "".join(f"{_short(each['name'], MOST_NAME):>{wide}}" for each, wide in pairs)
            for stage in stages:
                yield f"{stage:<12}" + "".join(f"{_scientific(each['stages'][stage]):>{wide}}" for each, wide in pairs)
            yield f"{'together':<12}" + "".join(f"{_scientific(each['kld']['mean']):>{wide}}" for each, wide in pairs)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _rate(speed: dict[str, Any]) -> str:
    """Tokens per second of decoding, or of scoring where nothing was asked."""
    found = speed.get("decode_tokens_per_second") or speed.get("score_tokens_per_second")
    return "-" if found is None else f"{found['median']:.0f} t/s"


def _memory(speed: dict[str, Any]) -> str:
    peak = speed.get("peak_bytes")
    return "-" if peak is None else f"{peak / 1e6:.0f} MB"
