"""A report as one page that needs nothing else: plots, tables, and the worst answers with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from phisight.compare.passages import Question
from phisight.compare.plots import Axis, Point, scatter
from phisight.compare.run import Comparison
from phisight.compare.speed import RATES
from phisight.compare.stages import KV_CACHE

__all__ = ["page_of"]

TEMPLATE = "report.html.jinja"
THUMBNAIL = 320
"""Longest side of a picture on the page in pixels."""

DECODING = "decode_tokens_per_second"

SIZE = Axis("size in MB", "less")
KLD = Axis("mean KL divergence in nats", "less", log=True, show="{:.0e}".format)
SPEED = Axis("decoding, tokens per second", "more")
SCORE = Axis("right answers in %", "more")


def page_of(report: dict[str, Any], comparison: Comparison) -> str:
    """The page of a report; pictures are drawn or read anew. Raises ImageError."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "scientific": _scientific, "fixed": _fixed, "level": _level}
    source = (files("phisight") / "compare" / TEMPLATE).read_text(encoding="utf-8")
    variants = report["variants"]
    return environment.from_string(source).render(
        report=report,
        plots=_plots(report),
        cards=_cards(report),
        formats={each["format"] for each in variants},
        hollow=any(not each["as_run"] for each in variants),
        baselines=any(each["baseline"] for each in variants),
        stages=[each for each in variants if each["stages"]],
        inner=_inner(variants),
        rates=[name for name in RATES if report["reference"]["speed"].get(name)],
        examples=_examples(report, comparison),
    )


def _cards(report: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """What to look at first, of the variants as they are run: a title, the variant, and its figures in words."""
    variants = [each for each in report["variants"] if each["as_run"] and each["kld"]["mean"] > 0]
    if len(variants) < 2:
        return []
    reference = report["reference"]
    closest = min(variants, key=lambda each: float(each["kld"]["mean"]))
    smallest = min(variants, key=lambda each: (int(each["bytes"]), float(each["kld"]["mean"])))
    cards = [
        ("Closest to the reference", closest, f"{_percent(closest['same_top1'], 2)} the same likeliest token"),
        (
            "Smallest",
            smallest,
            f"{smallest['bytes'] / 1e6:,.1f} MB, {_times(reference['bytes'], smallest['bytes'])} smaller",
        ),
    ]
    timed = [each for each in variants if _decoding(each)]
    if timed and (own := _decoding(reference)):
        fastest = max(timed, key=lambda each: _decoding(each) or 0.0)
        speed = _decoding(fastest) or 0.0
        cards.append(("Fastest to decode", fastest, f"{speed:,.0f} tokens/s, {_times(speed, own)} the reference's"))
    return [
        (title, each, f"{said}, KL divergence {_scientific(each['kld']['mean'])}, {_percent(each['score'])} right")
        if each["score"] is not None
        else (title, each, f"{said}, KL divergence {_scientific(each['kld']['mean'])}")
        for title, each, said in cards
    ]


def _times(value: float, other: float) -> str:
    return f"{value / other:.1f} times"


def _decoding(described: dict[str, Any]) -> float | None:
    """Tokens per second."""
    rate = described["speed"].get(DECODING)
    return None if rate is None else float(rate["median"])


def _inner(variants: list[dict[str, Any]]) -> set[str]:
    """Stages that are parts of another one of the same table."""
    names = {stage for each in variants for stage in each["stages"]}
    if "head" not in names:
        return set()
    return {name for name in names if name in ("tower", "projector", "head", KV_CACHE) or name.startswith("layer")}


def _plots(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and SVG of each plot for which there is something to show."""
    size = {id(each): each["bytes"] / 1e6 for each in report["variants"]}
    kld = {id(each): each["kld"]["mean"] for each in report["variants"]}
    speed = {id(each): _decoding(each) for each in report["variants"]}
    score = {id(each): None if each["score"] is None else 100 * each["score"] for each in report["variants"]}
    plots = []
    for title, (x, across), (y, up) in (
        ("Divergence against size", (SIZE, size), (KLD, kld)),
        ("Divergence against speed", (SPEED, speed), (KLD, kld)),
        ("Right answers against size", (SIZE, size), (SCORE, score)),
        ("Right answers against speed", (SPEED, speed), (SCORE, score)),
    ):
        points = _points(report["variants"], across, up)
        if points:
            plots.append((title, scatter(title, points, x, y)))
    return plots


def _points(
    variants: list[dict[str, Any]], across: Mapping[int, float | None], up: Mapping[int, float | None]
) -> list[Point]:
    points = []
    for each in variants:
        x, y = across[id(each)], up[id(each)]
        if x is not None and y is not None:
            details = f"{each['bytes'] / 1e6:.1f} MB, KL divergence {each['kld']['mean']:.2e}"
            if each["score"] is not None:
                details += f", {100 * each['score']:.1f} % right"
            name = _level(each["name"])
            points.append(Point(name, x, y, each["format"], each["as_run"], details, each["baseline"]))
    return points


def _examples(report: dict[str, Any], comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each variant as it is run: its worst questions with all that is shown of them."""
    pictures: dict[int, list[str]] = {}
    groups = []
    for each in (each for each in report["variants"] if each["as_run"]):
        rows = []
        for worst in each["worst"]:
            number = worst["passage"]
            question = comparison.passages[number]
            if not isinstance(question, Question):
                continue
            if number not in pictures:
                pictures[number] = [_data_url(picture) for picture in question.pictures()]
            ours = comparison.answers[number]
            rows.append(
                {
                    **worst,
                    "task": question.case.task,
                    "origin": f"{question.case.origin} {question.case.number}",
                    "question": question.case.question,
                    "expected": _expected(question.case.expected.as_json),
                    "reference": ours["answer"],
                    "reference_right": ours["right"],
                    "pictures": pictures[number],
                }
            )
        if rows:
            groups.append((each["name"], rows))
    return groups


def _expected(value: Any) -> str:
    """A text, texts, a number, or a box with the decimals that an answer may have."""
    if isinstance(value, list):
        return ", ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in value)
    return str(value)


def _data_url(picture: Image.Image) -> str:
    """The picture itself on the page, small."""
    shown = picture.copy()
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    if max(picture.size) > THUMBNAIL:  # a photo
        shown.save(file, format="JPEG", quality=80)
        kind = "jpeg"
    else:
        shown.save(file, format="PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _level(name: str) -> str:
    """A name that is shorter where it tells an accuracy level."""
    return name.replace("(accuracy_level ", "(level ")


def _percent(share: float | None, digits: int = 1) -> str:
    return "\u2013" if share is None else f"{100 * share:.{digits}f}\u2009%"


def _scientific(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2e}" if value else "0"


def _fixed(value: float | None, digits: int = 1) -> str:
    return "\u2013" if value is None else f"{value:,.{digits}f}"
