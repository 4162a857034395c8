"""The user's own cases: a folder with pictures and `cases.jsonl`, one JSON object a line.

{"image": "receipt.jpg", "question": "What is the total?", "expected": 41.5}
{"image": ["before.png", "after.png"], "question": "What changed?", "expected": ["the door", "door"],
 "metric": "contains", "task": "changes", "mode": "think", "id": "door-3"}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from phisight.errors import InputError
from phisight.evaluate.cases import Case
from phisight.evaluate.scoring import BoxHit, Contains, Exact, Expected, Number
from phisight.json_lines import Fields, read_lines, read_object
from phisight.prompt import Mode

__all__ = ["FILE_NAME", "METRICS", "read_folder"]

FILE_NAME = "cases.jsonl"
METRICS = ("exact", "contains", "number", "box")
TASK = "cases"
"""The group of the cases that name none."""

FIELDS: Fields = {
    "image": ((str, list), "the name of a file, or a list of them"),
    "question": (str, "a text"),
    "expected": ((str, int, float, list), "a text, a list of texts, a number or a box [x1, y1, x2, y2]"),
    "metric": (str, ", ".join(METRICS)),
    "tolerance": ((int, float), "how far a number may be off"),
    "mode": (str, ", ".join(get_args(Mode))),
    "task": (str, "the name of the group in which the case counts"),
    "id": ((str, int), "a text or a whole number"),
}


def read_folder(folder: Path) -> tuple[dict[str, list[Case]], list[str]]:
    """The cases of a folder by task, and in words what is wrong with the others, each with the number of its line.

    Pictures are there, but not opened. Raises InputError for a file that cannot be read or is empty.
    """
    path = folder / FILE_NAME
    tasks: dict[str, list[Case]] = {}
    problems = []
    lines_of_ids: dict[str | int, int] = {}
    for number, line in read_lines(path):
        try:
            case = _case(read_object(line, FIELDS), number, folder)
            if case.id is not None and (first := lines_of_ids.setdefault(case.id, number)) != number:
                raise InputError(f"id {case.id!r} is that of line {first} too: give each case its own")
            tasks.setdefault(case.task, []).append(case)
        except InputError as error:
            problems.append(f"line {number}: {' '.join(str(error).split())}")
    if not tasks and not problems:
        raise InputError(f"{path} is empty: give one JSON object with question and expected on each line")
    return tasks, problems


def _case(fields: Mapping[str, Any], number: int, folder: Path) -> Case:
    for name in ("question", "expected"):
        if name not in fields:
            raise InputError(f"the case has no {name}: give {FIELDS[name][1]}")
    mode = fields.get("mode")
    if mode is not None and mode not in get_args(Mode):
        raise InputError(f"mode is {mode!r}: give {FIELDS['mode'][1]}")
    task = fields.get("task", TASK).strip()
    if not task or not task.isprintable():
        raise InputError(f"task is {task!r}: give {FIELDS['task'][1]}")
    return Case(
        task,
        None,
        "line",
        number,
        fields["question"],
        tuple(_picture(name, folder) for name in _names(fields.get("image", []))),
        _expected(fields),
        mode,
        fields.get("id"),
    )


def _names(image: str | list[Any]) -> list[Any]:
    return [image] if isinstance(image, str) else image


def _picture(name: object, folder: Path) -> Path:
    if not isinstance(name, str):
        raise InputError(f"image has {name!r}: give {FIELDS['image'][1]}")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}: check the path of the image")
    return path


def _expected(fields: Mapping[str, Any]) -> Expected:
    """What the case expects, by its metric or else by the type of what is expected."""
    value = fields["expected"]
    metric = fields.get("metric", _usual_metric(value))
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}: give {FIELDS['metric'][1]}")
    if "tolerance" in fields and metric != "number":
        raise InputError(f"tolerance goes with the metric number, and this is {metric}: leave it out")
    if metric == "number":
        tolerance = _number(fields.get("tolerance", 0), "tolerance")
        if tolerance < 0:
            raise InputError(f"tolerance is {tolerance}: give 0 or more")
        return Number(_number(value, "expected"), tolerance)
    if metric == "box":
        return BoxHit(_box(value))
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"expected is {value!r}: the metric {metric} takes a text or a list of texts, none empty")
    return Exact(tuple(texts)) if metric == "exact" else Contains(tuple(texts))


def _usual_metric(expected: object) -> str:
    if isinstance(expected, list):
        return "exact" if any(isinstance(each, str) for each in expected) else "box"
    return "exact" if isinstance(expected, str) else "number"


def _number(value: object, name: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} is {value!r:.60}: the metric number takes a number")
    return number


def _box(value: object) -> tuple[float, float, float, float]:
    wanted = "a box is [x1, y1, x2, y2], x1 < x2 and y1 < y2, as shares of the picture's sides from 0 to 1"
    if not isinstance(value, list) or len(value) != 4:
        raise InputError(f"expected is {value!r:.60}: {wanted}")
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in value):
        raise InputError(f"expected is {value!r:.60}: {wanted}")
    x1, y1, x2, y2 = value
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise InputError(f"expected is {value!r:.60}: {wanted}")
    return float(x1), float(y1), float(x2), float(y2)
