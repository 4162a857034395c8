"""What is scored: stretches of tokens whose last ones are answered by the reference itself, or come from a text.

questions (drawn, or a folder of cases) -> the reference's greedy answers -> ids and right tokens
a text -> windows of 512 tokens, of which the second half counts, as in llama-perplexity -> ids and right tokens
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from PIL import Image

from phisight.answer import Answer, collect
from phisight.compare.workspace import fingerprint
from phisight.errors import InputError
from phisight.evaluate import Case, Cases, DrawnCases, read_folder
from phisight.evaluate.scoring import Verdict
from phisight.images import open_image
from phisight.model import Model
from phisight.naflex import Patches
from phisight.prompt import Mode, user_message
from phisight.tasks import TASKS
from phisight.tokenizer import Tokenizer

__all__ = [
    "WINDOW",
    "Asked",
    "Asking",
    "Passage",
    "Question",
    "Window",
    "ask",
    "drawn_sources",
    "folder_sources",
    "text_windows",
    "to_score",
]

WINDOW = 512
"""Positions of a text that a model reads at once; it is scored on the second half (llama-perplexity's --ctx-size)."""


@dataclass(frozen=True)
class Asking:
    """How questions are put: at most `max_tokens` of answer, `mode` where a question has none of its own."""

    max_tokens: int
    mode: Mode = "auto"
    max_patches: int | None = None


@dataclass(frozen=True)
class Question:
    """A question, here without its pictures, and where they come from. `fingerprint` covers their pixels too."""

    case: Case
    source: Cases
    has_pictures: bool
    fingerprint: str

    @classmethod
    def of(cls, source: Cases) -> Question:
        """Of the only one among the cases of `source`. Raises ImageError for a picture that cannot be read."""
        (case,) = source
        pixels = [_digest(open_image(picture)) for picture in case.pictures]
        asked = fingerprint(case.question, case.mode, case.expected.metric, case.expected.as_json, pixels)
        return cls(replace(case, pictures=()), source, bool(pixels), asked)

    def pictures(self) -> list[Image.Image]:
        """Drawn or read anew: all of them would take much memory. Raises ImageError."""
        (case,) = self.source
        return [open_image(picture) for picture in case.pictures]


@dataclass(frozen=True)
class Window:
    """One window of a text: its tokens, (512,), and its number from 0."""

    ids: tuple[int, ...]
    number: int

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.ids)


Passage: TypeAlias = Question | Window


@dataclass(frozen=True)
class Asked:
    """A question that a model has answered: the ids of prompt and answer, what it saw, the answer and its verdict."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    patches: tuple[Patches, ...]
    answer: Answer
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """What a report needs of it."""
        return {
            "answer": self.answer.text.strip(),
            "thought": self.answer.thought.strip(),
            "finish_reason": self.answer.finish_reason,
            "right": self.verdict.right,
            "overlap": self.verdict.overlap,
            "stats": self.answer.stats.as_json(),
        }


def ask(model: Model, question: Question, asking: Asking) -> Asked:
    """The model's likeliest answer. Raises PromptError, ImageError, EngineError."""
    case, pictures = question.case, question.pictures()
    started = perf_counter()
    patches = tuple(model.preprocess(picture, asking.max_patches) for picture in pictures)
    prompt = model.prompt([user_message(case.question, len(pictures))], len(pictures), mode=case.mode or asking.mode)
    options = model.options(temperature=0.0, max_tokens=asking.max_tokens)
    prepared = perf_counter() - started
    chunks = list(model.stream_prompt(prompt, patches, options, preprocess_seconds=prepared))
    answer = collect(chunks, prompt.notes)
    verdict = case.expected.judge(answer.text.strip())
    return Asked(prompt.ids, chunks[-1].token_ids, patches, answer, verdict)


def drawn_sources(count: int) -> list[Cases]:
    """The first `count` questions of each task, one by one; each is drawn when it is looked at."""
    return [DrawnCases(task, range(seed, seed + 1)) for task in TASKS for seed in range(count)]


def folder_sources(folder: Path, count: int | None) -> tuple[list[Cases], list[str]]:
    """The first `count` cases of each task in a folder, one by one, and what is wrong with the others in words.

    Raises InputError for a file of cases that cannot be read or is empty.
    """
    tasks, problems = read_folder(folder)
    return [[case] for cases in tasks.values() for case in cases[:count]], problems


def text_windows(text: str, tokenizer: Tokenizer, context: int, count: int | None) -> list[Window]:
    """The first `count` whole windows of a text; what is left at its end is not scored.

    Raises InputError for a text without one, or a `context` that is shorter, TokenizerError.
    """
    if context < WINDOW:
        raise InputError(f"a text is read {WINDOW} positions at a time, but the context holds {context}")
    ids = tokenizer.encode(text, parse_special=False)
    whole = len(ids) // WINDOW
    if not whole:
        raise InputError(f"the text has {len(ids)} tokens, wanted {WINDOW} or more: give a longer one")
    number = whole if count is None else min(count, whole)
    return [Window(tuple(ids[at * WINDOW : (at + 1) * WINDOW]), at) for at in range(number)]


def to_score(window: Window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A window -> the ids to run, and the right tokens of the last of their positions.

    llama-perplexity counts the tokens from number 257 on: each has at least half a window before it.
    """
    return window.ids[:-1], window.ids[WINDOW // 2 + 1 :]


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
