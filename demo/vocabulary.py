"""The demo model's tokenizer: byte-level BPE with cl100k's split pattern, trained on the tasks' own words.

Digits and codes are no part of what it is trained on, so they are read one character at a time. Coordinates are tokens
of their own, one for each hundredth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

import tokenizers

from phisight.export.documents import tokenizer_document
from phisight.tasks import SCENES, draw, grids_of
from phisight.tasks.arithmetic import arithmetic_question
from phisight.tasks.canvas import COLOURS
from phisight.tasks.count import SHAPES
from phisight.tasks.question import Question
from phisight.tasks.read import WORDS
from phisight.tokenizer import byte_alphabet
from phisight.training.aids import more_questions, page_scene
from phisight.training.architecture import COORDINATES, ORDINARY_TOKENS

__all__ = ["Vocabulary", "tokenizer_json"]

DRAWN = 600
"""Scenes of each task whose words are learned."""


def tokenizer_json() -> dict[str, Any]:
    """The document tokenizer.json; the same every time."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    split = tokenizer_document({})["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY_TOKENS, min_frequency=2, show_progress=False, initial_alphabet=sorted(byte_alphabet())
    )
    tokenizer.train_from_iterator(_texts(), trainer)

    model = json.loads(tokenizer.to_str())["model"]
    return tokenizer_document(model["vocab"], model["merges"], [f"{i / 100:.2f}" for i in range(COORDINATES)])


def _texts() -> Iterator[str]:
    rng = Random("phisight vocabulary")
    plain = ["user", "assistant", "system", "image", "Describe", "please", "Hello", *WORDS, *COLOURS, *SHAPES, "none"]
    for word in plain:
        yield from [word, f" {word}"] * 200
    for task in SCENES:
        for _ in range(DRAWN):
            scene = draw(task, rng, rng.choice(grids_of(task)))
            for question in (*scene.questions, *more_questions(rng, scene)):
                yield from _words(question)
    for _ in range(DRAWN // 4):
        for question in page_scene(rng, (128, 128)).questions:
            yield from _words(question)
        yield from _words(arithmetic_question(rng))


def _words(question: Question) -> Iterator[str]:
    """The question and, unless they spell out characters, thought and answer; digits are left out."""
    spells = question.task in ("line", "character") or question.kind in ("code", "price")
    for text in (question.text,) if spells else (question.text, question.thought, question.answer):
        yield re.sub(r"[0-9]", " ", text)


class Vocabulary:
    """Token ids of texts, looked up in a table where the text was seen before."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        found = self._known.get(text)
        if found is None:
            found = self._library.encode(text, add_special_tokens=False).ids
            if len(self._known) < 100_000:
                self._known[text] = found
        return found

    def one(self, token: str) -> int:
        """The id of a token. Raises KeyError."""
        found = self._library.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def text(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self._library.decode(ids, skip_special_tokens=False)
