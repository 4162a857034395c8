"""Plan files: the type of single tensors, written by a measurement or by hand, and read again.

    {"schema": 1, "format": "onnx" | "gguf", "method": ..., "target": "4.6bpw" | "9GB" | "kld<0.01",
     "bytes": of decoder, head and embeddings, "bits_per_weight": of these,
     "kld": {"sum": of the tensors' own, "measured": of the whole plan or null, "positions": n},
     "tensors": {name: {"type": ..., "bits_per_weight": ..., "kld": that it alone brings,
                        "choices": {type: {"bytes": n, "kld": x}}}}}

Reading needs nothing but "tensors", and in there nothing but "type"; {name: type} alone is a plan too. Names are those
of the format: the checkpoint's for ONNX, llama.cpp's for GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phisight.errors import InputError, PhisightError

__all__ = ["SCHEMA", "PlanFile", "read_plan", "write_plan"]

SCHEMA = 1


@dataclass(frozen=True)
class PlanFile:
    """What a plan file says: types by tensor, in its order, and where each stands."""

    path: Path
    types: tuple[tuple[str, str], ...]
    lines: Mapping[str, int]

    def at(self, name: str) -> str:
        """The file and the line of a tensor, for an error."""
        return f"{self.path}: line {self.lines[name]}"


def read_plan(path: Path, form: str) -> PlanFile:
    """Types by tensor for the format `form`. Raises InputError that names file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"the plan {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the plan {path} is not UTF-8 from byte {error.start} on") from None
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: {error.msg}: the plan is no JSON") from None
    if not isinstance(pairs, _Pairs):
        raise InputError(
            f"{path}: line 1: the plan is a JSON {type(pairs).__name__}, wanted an object of types by tensor, such as "
            '{"output.weight": "Q6_K"}'
        )
    whole = dict(pairs)
    tensors: Any = pairs
    if "tensors" in whole or "schema" in whole:
        _check_head(path, whole, form)
        tensors = whole.get("tensors")
        if not isinstance(tensors, _Pairs):
            raise InputError(f"{path}: line {_line(text, 'tensors')}: tensors is no object of types by tensor")
    found = dict(_types(path, text, tensors))
    if not found:
        raise InputError(f"{path}: line 1: the plan names no tensor, wanted one or more")
    return PlanFile(path, tuple(found.items()), {name: _line(text, name) for name in found})


def write_plan(path: Path, document: Mapping[str, Any]) -> None:
    """The file appears when it is complete. Raises PhisightError if the place cannot be written."""
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise PhisightError(f"{path} cannot be written: {error.strerror or error}") from None


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its order and its repetitions."""


def _check_head(path: Path, whole: dict[str, Any], form: str) -> None:
    schema = whole.get("schema", SCHEMA)
    if schema != SCHEMA or isinstance(schema, bool):
        raise InputError(f"{path}: schema is {schema!r}, this version of phisight reads {SCHEMA}")
    if whole.get("format", form) != form:
        raise InputError(f"{path}: the plan is of format {whole['format']!r}, and --format is {form}")


def _types(path: Path, text: str, tensors: _Pairs) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, value in tensors:
        line = f"{path}: line {_line(text, name, len(seen & {name}))}"
        if name in seen:
            raise InputError(f"{line}: {name} stands there a second time: leave one")
        seen.add(name)
        chosen = dict(value).get("type") if isinstance(value, _Pairs) else value
        if not isinstance(chosen, str):
            said = "has no type" if isinstance(value, _Pairs) and chosen is None else f"has the type {chosen!r}"
            raise InputError(f'{line}: {name} {said}, wanted a name, such as "Q6_K" or "int8 block 32"')
        yield name, chosen


def _line(text: str, name: str, skip: int = 0) -> int:
    """Where a key stands, from 1; 1 if it is written in another way, with escapes."""
    key = json.dumps(name, ensure_ascii=False)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if key in line]
    return lines[min(skip, len(lines) - 1)] if lines else 1
