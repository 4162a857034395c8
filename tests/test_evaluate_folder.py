"""The user's own cases: what a line may hold, and what is said of one that is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from phisight.errors import InputError
from phisight.evaluate.folder import read_folder
from phisight.evaluate.scoring import BoxHit, Contains, Exact, Expected, Number


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    Image.new("RGB", (48, 64)).save(tmp_path / "b.png")
    return tmp_path


def write(folder: Path, cases: Sequence[object]) -> Path:
    """Cases as lines; a string is a line as it stands."""
    lines = [case if isinstance(case, str) else json.dumps(case) for case in cases]
    (folder / "cases.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"expected": "x"}, Exact(("x",))),
        ({"expected": ["x", "y"]}, Exact(("x", "y"))),
        ({"expected": ["x", "y"], "metric": "contains"}, Contains(("x", "y"))),
        ({"expected": "3", "metric": "contains"}, Contains(("3",))),
        ({"expected": 3}, Number(3)),
        ({"expected": 2.5, "metric": "number", "tolerance": 1}, Number(2.5, 1)),
        ({"expected": [0, 0.25, 0.5, 1]}, BoxHit((0, 0.25, 0.5, 1))),
        ({"expected": [0, 0.25, 0.5, 1], "metric": "box"}, BoxHit((0, 0.25, 0.5, 1))),
    ],
)
def test_the_metric_follows_from_what_is_expected(folder: Path, fields: dict[str, object], expected: Expected) -> None:
    tasks, problems = read_folder(write(folder, [{"question": "?"} | fields]))
    assert not problems
    (case,) = tasks["cases"]
    assert case.expected == expected


def test_all_fields(folder: Path) -> None:
    lines = [
        {"image": "a.png", "question": "What?", "expected": "x", "task": "ours", "id": 7, "mode": "think"},
        "",
        {"image": ["a.png", str(folder / "b.png")], "question": "Which?", "expected": 1},
        {"question": "2+2?", "expected": 4, "task": "ours", "id": "sum"},
    ]
    tasks, problems = read_folder(write(folder, lines))
    assert problems == []
    assert list(tasks) == ["ours", "cases"]
    first, last = tasks["ours"]
    assert (first.number, first.id, first.mode, first.question) == (1, 7, "think", "What?")
    assert (last.number, last.id, last.mode, last.pictures) == (4, "sum", None, ())
    assert first.pictures == (folder / "a.png",)
    (pair,) = tasks["cases"]
    assert (pair.number, pair.pictures) == (3, (folder / "a.png", folder / "b.png"))


WRONG: list[tuple[object, str]] = [
    ("not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "JSON list"),
    ({"question": "x", "expected": "y", "colour": 1}, "there is no 'colour'"),
    ({"expected": "y"}, "the case has no question: give a text"),
    ({"question": "x"}, "the case has no expected"),
    ({"question": 5, "expected": "y"}, "question is 5"),
    ({"question": "x", "expected": "y", "image": "none.png"}, "none.png does not exist"),
    ({"question": "x", "expected": "y", "image": "."}, "is no file"),
    ({"question": "x", "expected": "y", "image": ["a.png", 3]}, "image has 3"),
    ({"question": "x", "expected": None}, "expected is None"),
    ({"question": "x", "expected": True}, "expected is True"),
    ({"question": "x", "expected": []}, "expected is []"),
    ({"question": "x", "expected": " "}, "none empty"),
    ({"question": "x", "expected": ["y", 3]}, "expected is ['y', 3]"),
    ({"question": "x", "expected": "y", "metric": "bleu"}, "metric is 'bleu': give exact, contains, number, box"),
    ({"question": "x", "expected": 3, "metric": "exact"}, "expected is 3: the metric exact takes a text"),
    ({"question": "x", "expected": "3", "metric": "number"}, "expected is '3': the metric number takes a number"),
    ('{"question": "x", "expected": NaN}', "expected is nan"),
    ('{"question": "x", "expected": 1' + "0" * 400 + "}", "expected is 1000"),
    ({"question": "x", "expected": 3, "tolerance": -1}, "tolerance is -1"),
    ({"question": "x", "expected": "y", "tolerance": 1}, "tolerance goes with the metric number"),
    ({"question": "x", "expected": [1, 2, 3]}, "a box is [x1, y1, x2, y2]"),
    ({"question": "x", "expected": [0.5, 0, 0.4, 1]}, "x1 < x2"),
    ({"question": "x", "expected": [10, 20, 30, 40]}, "as shares of the picture's sides"),
    ({"question": "x", "expected": "y", "mode": "fast"}, "mode is 'fast'"),
    ({"question": "x", "expected": "y", "task": ""}, "task is ''"),
    ({"question": "x", "expected": "y", "task": "a\nb"}, "task is 'a\\nb'"),
    ({"question": "x", "expected": "y", "id": "first"}, "id 'first' is that of line 1 too"),
    ({"question": "x", "expected": "y", "id": 1.5}, "id is 1.5"),
]


def test_every_bad_line_is_told_with_its_number(folder: Path) -> None:
    good = {"question": "x", "expected": "y"}
    write(folder, [good | {"id": "first"}, *(case for case, _ in WRONG), good])
    path = folder / "cases.jsonl"
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    tasks, problems = read_folder(folder)
    assert [case.number for case in tasks["cases"]] == [1, len(WRONG) + 2]
    wanted = [*(said for _, said in WRONG), "not UTF-8"]
    numbers = [*range(2, len(WRONG) + 2), len(WRONG) + 3]
    for problem, number, said in zip(problems, numbers, wanted, strict=True):
        assert problem.startswith(f"line {number}: ")
        assert said in problem
        assert "\n" not in problem


def test_windows_line_ends_and_a_byte_order_mark(folder: Path) -> None:
    line = json.dumps({"question": "x", "expected": "y"}).encode()
    (folder / "cases.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    tasks, problems = read_folder(folder)
    assert (len(tasks["cases"]), problems) == (2, [])


def test_a_folder_without_cases(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cases\.jsonl cannot be read"):
        read_folder(folder)
    with pytest.raises(InputError, match=r"cases\.jsonl is empty"):
        read_folder(write(folder, ["", " "]))
