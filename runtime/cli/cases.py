"""The questions of a batch: lines of JSON, each read into a case or into what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from phisight.errors import InputError
from phisight.prompt import Message, Mode, user_message

__all__ = ["BadCase", "Case", "read_cases"]

OPTION_KEYS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "thinking_budget",
)
KEYS = ("id", "prompt", "messages", "image", "images", "mode", "system", "max_patches", *OPTION_KEYS)


@dataclass(frozen=True)
class Case:
    """One question. None stands for what the line leaves to the command.

    source: the line as it was parsed, of which a digest can be made.
    options: those fields of GenerateOptions that the line gives.
    """

    line: int
    id: str | int
    source: Any
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    mode: Mode | None = None
    system: str | None = None
    max_patches: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCase:
    """A line that is no question, and why."""

    line: int
    id: str | int
    source: Any
    problem: str


def read_cases(path: Path) -> list[Case | BadCase]:
    """All cases of a file in order; lines without content are none.

    Raises InputError if the file cannot be read, is not UTF-8, has not one line that is a JSON object, or has an id
    twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the cases cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    # Not splitlines: JSON may hold U+2028 and its like as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    cases = [_read_line(number, line, path.parent) for number, line in lines]
    if not any(isinstance(case.source, dict) for case in cases):
        raise InputError(f'{path} has no line that is a JSON object: one like {{"prompt": "..."}} per line is wanted')
    seen: dict[str | int, int] = {}
    for case in cases:
        if case.id in seen:
            raise InputError(f"{path}: lines {seen[case.id]} and {case.line} have the same id {case.id!r}")
        seen[case.id] = case.line
    return cases


def _read_line(number: int, line: str, folder: Path) -> Case | BadCase:
    try:
        source = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadCase(number, number, line, f"line {number} is not JSON: {error}")
    if not isinstance(source, dict):
        return BadCase(number, number, source, f"line {number} is {type(source).__name__}: a JSON object is wanted")
    given = source.get("id", number)
    id_: str | int = given if isinstance(given, str | int) and not isinstance(given, bool) else number
    try:
        return _read_case(number, id_, source, folder)
    except InputError as error:
        return BadCase(number, id_, source, f"line {number}: {error}")


def _read_case(number: int, id_: str | int, source: dict[str, Any], folder: Path) -> Case:
    unknown = [key for key in source if key not in KEYS]
    if unknown:
        raise InputError(f"unknown keys {', '.join(map(repr, unknown))}: known are {', '.join(KEYS)}")
    if "id" in source and id_ is not source["id"]:
        raise InputError(f"id is {source['id']!r}: a string or a whole number is wanted")
    images = _image_names(source)
    return Case(
        line=number,
        id=id_,
        source=source,
        messages=_messages(source, len(images)),
        images=tuple(folder / name for name in images),
        mode=_mode(source.get("mode")),
        system=_system(source),
        max_patches=_max_patches(source.get("max_patches")),
        options={key: _option(key, source[key]) for key in OPTION_KEYS if key in source},
    )


def _image_names(source: dict[str, Any]) -> list[str]:
    if "image" in source and "images" in source:
        raise InputError("there are both image and images: give one of them")
    names = [source["image"]] if "image" in source else source.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError("image is a file name, images a list of them")
    return names


def _messages(source: dict[str, Any], num_images: int) -> tuple[Message, ...]:
    if ("prompt" in source) == ("messages" in source):
        raise InputError("give either prompt or messages")
    if "messages" in source:
        if not isinstance(source["messages"], list):
            raise InputError(f"messages is {type(source['messages']).__name__}: a list is wanted")
        return tuple(source["messages"])
    if not isinstance(source["prompt"], str):
        raise InputError(f"prompt is {type(source['prompt']).__name__}: a string is wanted")
    return (user_message(source["prompt"], num_images),)


def _mode(mode: object) -> Mode | None:
    if mode is None:
        return None
    for known in get_args(Mode):
        if mode == known:
            found: Mode = known
            return found
    raise InputError(f"mode is {mode!r}, wanted {', '.join(get_args(Mode))}")


def _system(source: dict[str, Any]) -> str | None:
    system = source.get("system")
    if system is not None and not isinstance(system, str):
        raise InputError(f"system is {type(system).__name__}: a string is wanted")
    if system is not None and "messages" in source:
        raise InputError("system goes with prompt: put it into the messages")
    return system


def _max_patches(count: object) -> int | None:
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise InputError(f"max_patches is {count!r}: a whole number, 1 or more, is wanted")
    return count


def _option(key: str, value: Any) -> Any:
    """As GenerateOptions has it, which checks it: JSON has no tuples."""
    if key == "stop":
        return tuple(value) if isinstance(value, list) else (value,)
    return value
