"""Plots of a comparison, and what a table and a name look like."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from phisight.compare.page import page_of
from phisight.compare.plots import Axis, Point, pareto_front, scatter
from phisight.compare.run import Comparison
from phisight.compare.subjects import unique_names

SIZE, KLD, SCORE = Axis("MB", "less"), Axis("KLD", "less", log=True), Axis("right", "more")


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point(f"p{number}", x, y, "onnx", True, "") for number, (x, y) in enumerate(places)]


def front(places: list[tuple[float, float]], x: Axis, y: Axis) -> list[str]:
    return [point.name for point in pareto_front(points(*places), x, y)]


def test_what_no_other_beats() -> None:
    places = [(1.0, 9.0), (2.0, 4.0), (3.0, 5.0), (4.0, 1.0)]
    assert front(places, SIZE, KLD) == ["p0", "p1", "p3"]
    assert front(places, SIZE, SCORE) == ["p0"]
    assert front([(1.0, 2.0), (1.0, 3.0), (2.0, 2.0)], SIZE, KLD) == ["p0"]  # as good one way, worse the other
    assert front([(1.0, 2.0), (1.0, 2.0)], SIZE, KLD) == ["p0", "p1"]


@pytest.mark.parametrize("places", [[(5.0, 0.0)], [(5.0, 0.0), (5.0, 1e-3)], [(0.0, 3.0)] * 4, [(1e9, 1e-9), (1, 9)]])
def test_any_values_can_be_drawn(places: list[tuple[float, float]]) -> None:
    for y in (KLD, SCORE):
        drawn = scatter("A plot", points(*places), SIZE, y)
        assert drawn.count("<circle") == len(places)
        assert "nan" not in drawn
        assert "inf" not in drawn
        for x, top in re.findall(r'<circle [^>]*cx="([^"]+)" cy="([^"]+)"', drawn):
            assert 0 <= float(x) <= 620
            assert 0 <= float(top) <= 380
    assert "Nothing" in scatter("A plot", [], SIZE, KLD)


def test_names_are_shown_and_cover_no_other_name() -> None:
    crowd = [Point(f"variant-{number}", 1 + number / 50, 1.0, "gguf", number % 2 == 0, "") for number in range(6)]
    drawn = scatter("A plot", crowd, SIZE, SCORE)
    found = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)">(variant-\d)</text>', drawn)
    assert sorted(name for _, _, name in found) == [point.name for point in crowd]
    for index, (x, y, _) in enumerate(found):
        for other_x, other_y, _ in found[index + 1 :]:
            assert abs(float(y) - float(other_y)) >= 14 or abs(float(x) - float(other_x)) >= 7 * 9


def test_names_are_text() -> None:
    drawn = scatter("<b>", [Point('<i>&"', 1, 1, "checkpoint", True, "a < b")], SIZE, KLD)
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    Tags().feed(drawn)
    assert not {"b", "i"} & set(tags)
    assert "path" in tags


def test_unique_names(tmp_path: Path) -> None:
    def names(*paths: str) -> list[str]:
        return unique_names([tmp_path / path for path in paths])

    assert names("a/int4", "b/int8") == ["int4", "int8"]
    assert names("a/int4", "b/int4", "b/int8") == ["a/int4", "b/int4", "int8"]
    assert names("a/x/m.gguf", "b/x/m.gguf") == ["a/x/m.gguf", "b/x/m.gguf"]
    assert names("a/int4", "a/int4", "int8", "b/int8") == ["int4", "int4 (2)", f"{tmp_path.name}/int8", "b/int8"]
    assert unique_names([]) == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_in_light_and_dark(tmp_path: Path) -> None:
    """The ground is the scheme's; marks, text and cards lie on it."""
    described = {
        **{
            "path": "",
            "format": "onnx",
            "accuracy_level": None,
            "as_run": True,
            "baseline": False,
            "bytes": 9,
            "bpw": 4.5,
        },
        **{"bpw_all": 5, "tasks": {}, "score": None, "speed": {}},
    }
    kld = dict.fromkeys(("mean", "error", "median", "p99", "p999", "max"), 1e-3)
    figures = {
        "positions": 9,
        "kld": kld,
        "same_top1": 1,
        "right_token": {"mean": 0, "rms": 0},
        "ppl": 2,
        "ppl_ratio": 1,
    }
    more = {"ppl_ratio_error": 0, "same_answers": None, "stages": {"pixels": 0, "decoder": 1e-3}, "worst": []}
    report = {
        **{
            "schema": 1,
            "phisight": "0",
            "absent": [{"name": "gone", "reason": "missing", "install": "pip"}],
            "notes": [],
        },
        "data": {"kind": "text", "source": "a.txt", "passages": 1, "positions": 9, "tasks": {}},
        "reference": {**described, "name": "float", "ppl": 2},
        "variants": [{**described, **figures, **more, "name": name} for name in ("first", "second")],
    }
    file = tmp_path / "report.html"
    file.write_text(page_of(report, Comparison(None, (), (), {}, ())), encoding="utf-8")  # type: ignore[arg-type]
    grounds = []
    for scheme in (1, 0):
        shot = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
                *(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,1600", f"--screenshot={shot}"),
                file.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        with Image.open(shot) as picture:
            grounds.append(picture.convert("RGB").getpixel((2, 2)))
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    assert min(grounds[0]) > 200
    assert max(grounds[1]) < 60
