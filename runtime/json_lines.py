"""Files that people write with one JSON object on each line: what is wrong with a line is said in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from phisight.errors import InputError

__all__ = ["Fields", "read_lines", "read_object"]

Fields: TypeAlias = Mapping[str, tuple[type | tuple[type, ...], str]]
"""What an object may hold: the type or types of each field, and in words what is wanted."""


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not empty; a byte order mark is passed over.

    Raises InputError for a file that cannot be read.
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}: give a file of cases") from None
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def read_object(line: bytes, fields: Fields, unchecked: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object of a line. Its fields are among `fields`, of the right types, or among `unchecked`.

    Raises InputError, which does not name the line.
    """
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"the line is not UTF-8 from byte {error.start} on: convert the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"the line is a JSON {type(found).__name__}: an object is wanted")
    allowed = [*fields, *unchecked]
    if unknown := sorted(found.keys() - set(allowed)):
        raise InputError(f"there is no {', '.join(map(repr, unknown))} in a case: wanted are {', '.join(allowed)}")
    for name, (types, wanted) in fields.items():
        value = found.get(name, ...)
        if value is not ... and (not isinstance(value, types) or isinstance(value, bool)):
            raise InputError(f"{name} is {value!r}: give {wanted}")
    return found
