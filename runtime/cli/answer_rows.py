"""The answers of `phisight batch`: a file with one JSON object on each line, which grows case by case.

A row is appended when its case is done, so that a break loses one answer at most. Everything else is a new file that
takes the old one's place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from phisight.errors import InputError, PhisightError

__all__ = ["AnswerRows", "Row"]

Row: TypeAlias = dict[str, Any]
"""line, id, case (the key of the case it answers), and text, thought, finish_reason, ... or error."""


class AnswerRows:
    """The rows of one file, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Row]:
        """All whole rows. What a break left of a last line is passed over.

        Raises InputError for a file that cannot be read or holds something else.
        """
        try:
            *lines, last = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror or error}") from None
        rows = []
        for number, line in enumerate(lines, 1):
            row = _parse(line)
            if row is None:
                raise InputError(f"{self._path} is no file of answers (line {number} is no row): give another --out")
            rows.append(row)
        unended = _parse(last)
        if last and not rows and unended is None:
            # Of a first row that was broken off this is what it begins with, and no other file is lost by mistake.
            beginning = b'{"line": '
            if not last.startswith(beginning) and not beginning.startswith(last):
                raise InputError(f"{self._path} is no file of answers: give another --out")
        return rows if unended is None else [*rows, unended]

    def replace(self, rows: Iterable[Row]) -> None:
        """Let the file hold exactly these rows; as it was if that fails. Raises PhisightError."""
        text = "".join(map(_line, rows)).encode()
        beside = self._path.with_name(self._path.name + ".partial")
        with self._written():
            if self._path.exists() and self._path.read_bytes() == text:
                return
            beside.write_bytes(text)
            beside.replace(self._path)

    def append(self, row: Row) -> None:
        """Add a row; it is out of the program's hands when this returns. Raises PhisightError."""
        with self._written(), self._path.open("ab") as file:
            file.write(_line(row).encode())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PhisightError(f"{self._path} cannot be written: {error.strerror or error}") from None


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("case"), str) else None


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
