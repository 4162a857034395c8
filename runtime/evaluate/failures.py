"""The wrong answers in a folder: their pictures as the model saw them, and `failures.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from phisight.errors import InputError, PhisightError
from phisight.evaluate.run import Result

__all__ = ["FILE_NAME", "FailureFolder"]

FILE_NAME = "failures.jsonl"


class FailureFolder:
    """A folder that fills failure by failure, so that a break loses none.

    Raises InputError if there is something in it already or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: name a new folder for the failures")
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: name a new folder for the failures")
        if not folder.absolute().parent.is_dir():
            raise InputError(f"{folder.absolute().parent} is no directory: make it, or name another folder")

    def make(self) -> None:
        """Make it, with an empty list. Raises PhisightError."""
        with self._written():
            self.folder.mkdir(exist_ok=True)
            (self.folder / FILE_NAME).touch()

    def add(self, result: Result, pictures: Sequence[Image.Image]) -> None:
        """The row is there once its pictures are. Raises PhisightError."""
        with self._written():
            names = []
            for index, picture in enumerate(pictures, 1):
                name = _stem(result) + (f"-{index}" if len(pictures) > 1 else "") + ".png"
                beside = self.folder / f"{name}.partial"
                picture.save(beside, format="PNG")
                beside.replace(self.folder / name)
                names.append(name)
            with (self.folder / FILE_NAME).open("ab") as file:
                file.write((json.dumps(_row(result, names)) + "\n").encode())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PhisightError(f"{self.folder} cannot be written: {error.strerror or error}") from None


def _stem(result: Result) -> str:
    """Such as read-17. Names of the user's tasks may hold anything; the number of the line tells their cases apart."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", result.case.task)[:40]
    return f"{name}-{'line' if result.case.origin == 'line' else ''}{result.case.number}"


def _row(result: Result, names: list[str]) -> dict[str, Any]:
    case, verdict = result.case, result.verdict
    row: dict[str, Any] = {"task": case.task, "kind": case.kind, case.origin: case.number, "id": case.id}
    row |= {"question": case.question, "expected": case.expected.as_json, "metric": case.expected.metric}
    row |= {"answer": result.text, "thought": None, "finish_reason": None}
    if result.answer is not None:
        row |= {"thought": result.answer.thought, "finish_reason": result.answer.finish_reason}
    if verdict.overlap is not None:
        row["iou"] = verdict.overlap
    return row | {"error": result.error, "pictures": names}
