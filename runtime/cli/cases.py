"""The cases of `phisight batch`: a file with one JSON object on each line.

bytes -> lines -> JSON -> checked fields -> Case: a question, or what is wrong with the line
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from phisight.cli.asking import SAMPLING, system_messages
from phisight.errors import InputError
from phisight.json_lines import Fields, read_lines, read_object
from phisight.prompt import Message, Mode, SystemBlock, user_message

__all__ = ["Case", "Question", "read_cases"]

FIELDS: Fields = {
    "id": ((str, int), "a text or a whole number"),
    "prompt": (str, "a text"),
    "messages": (list, "a list of messages"),
    "image": (str, "the name of a file"),
    "images": (list, "a list of names of files"),
    "mode": (str, ", ".join(get_args(Mode))),
    "system": (str, "a text"),
    "max_patches": (int, "a whole number"),
}
"""What a case may hold beside SAMPLING, whose values GenerateOptions checks."""


@dataclass(frozen=True)
class Question:
    """What is asked. `changes` are fields of GenerateOptions, as `mode` and `max_patches` only what the case says."""

    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    system_block: SystemBlock
    mode: Mode | None
    max_patches: int | None
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One line of the file: a question, or in words what is wrong.

    line: its number, from 1. id: the case's own, if it has one.
    key: a digest of the case and of what else decides its answer; equal cases are numbered, so that keys are unique.
    """

    line: int
    id: str | int | None
    key: str
    question: Question | str


def read_cases(path: Path, settings: Mapping[str, Any]) -> list[Case]:
    """All cases of a file in UTF-8; empty lines are passed over. `settings` is what else decides the answers.

    File names are relative to the file's folder; `settings["system"]` heads the cases that have no system message.
    Raises InputError for a file that cannot be read or has not one usable case.
    """
    lines = read_lines(path)
    decided = json.dumps(settings, sort_keys=True).encode()
    seen: Counter[bytes] = Counter()
    lines_of_ids: dict[str | int, int] = {}
    cases = []
    for number, line in lines:
        case_id = None
        try:
            fields = read_object(line, FIELDS, SAMPLING)
            identity = json.dumps(fields, sort_keys=True).encode()
            case_id = fields.get("id")
            question: Question | str = _read_question(fields, path.parent, settings.get("system"))
            if case_id is not None and lines_of_ids.setdefault(case_id, number) != number:
                question = f"id {case_id!r} is that of line {lines_of_ids[case_id]} too: give each case its own"
        except InputError as error:
            question, identity = str(error), line
        seen[identity] += 1
        key = hashlib.sha256(b"\0".join([decided, identity, str(seen[identity]).encode()])).hexdigest()[:16]
        cases.append(Case(number, case_id, key, question))
    if not any(isinstance(case.question, Question) for case in cases):
        first = f": line {cases[0].line}: {cases[0].question}" if cases else ": it is empty"
        raise InputError(f"{path} has no usable case{first}")
    return cases


def _read_question(fields: Mapping[str, Any], folder: Path, system: str | None) -> Question:
    for one, other in (("prompt", "messages"), ("image", "images"), ("system", "messages")):
        if one in fields and other in fields:
            raise InputError(f"the case has both {one} and {other}: give one of them")
    names = [fields["image"]] if "image" in fields else fields.get("images", [])
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"images has {name!r}: give {FIELDS['images'][1]}")
    if "mode" in fields and fields["mode"] not in get_args(Mode):
        raise InputError(f"mode is {fields['mode']!r}: give {FIELDS['mode'][1]}")
    opening, system_block = system_messages(fields.get("system", system))
    if "messages" in fields:
        messages = fields["messages"]
        if not messages:
            raise InputError("messages is empty: give at least one")
        if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
            opening = []
    elif "prompt" in fields:
        messages = [user_message(fields["prompt"], len(names))]
    else:
        raise InputError("the case has neither prompt nor messages: give one of them")
    changes = {name: fields[name] for name in SAMPLING if name in fields}
    if isinstance(stop := changes.get("stop"), list | str):
        changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return Question(
        (*opening, *messages),
        tuple(folder / name for name in names),
        system_block,
        fields.get("mode"),
        fields.get("max_patches"),
        changes,
    )
