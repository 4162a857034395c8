"""What an answer must look like: a JSON schema or a grammar, in force from where the thought ends.

Constraint (what is asked for) -> Matcher (follows the text of one answer) -> AnswerRule (follows its tokens, thought
and control tokens included)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.prompt import DIRECT, THINK, THINK_END, Mode
from phisight.tokenizer import Tokenizer

__all__ = ["AnswerRule", "Constraint", "Draw", "Mask", "Matcher"]

Mask: TypeAlias = NDArray[np.bool_]
"""(tokenizer's vocabulary,): which ids may come next."""

Draw: TypeAlias = Callable[[NDArray[np.float32], Mask | None], int]
"""Logits and a mask, None for all tokens -> token id."""


@dataclass(frozen=True)
class Constraint:
    """A form for the answer, without its thought: one of `json_schema`, `json_object` and `grammar`.

    It is compiled, and refused where that fails, when an answer is asked for. An answer that ends by length, or at a
    stop text, is a beginning: its JSON may be incomplete.
    """

    kind: Literal["json", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON that fits a schema, given as an object or as its JSON text. Raises InputError if it is neither."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise InputError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, Mapping):
            found = type(schema).__name__
            raise InputError(f'the JSON schema is of type {found}: give an object such as {{"type": "object"}}')
        try:
            return cls("json", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the JSON schema cannot be written as JSON: {error}") from None

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """Text of a grammar in llguidance's variant of Lark; it begins at the rule `start`."""
        return cls("lark", text)

    @property
    def name(self) -> str:
        """For messages."""
        return "JSON schema" if self.kind == "json" else "grammar"


class Matcher(Protocol):
    """Follows the text of one answer, token by token."""

    def allowed(self) -> Mask:
        """Which ids may come next; the stop ids where the text may end. Changed by the next call.

        Raises EngineError when the grammar grows too complex, or when nothing may follow.
        """

    def advance(self, token_id: int) -> None:
        """Take a token of the text. Raises EngineError for one that is not allowed."""

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""


class AnswerRule:
    """Which tokens one generation may draw. A thought is free, but cannot end the generation.

    Where the prompt leaves it to the model whether to think, the first token is drawn freely: `<think>` and
    `<|dummy_84|>` are taken, another one is drawn again under the matcher. So a form that the model finds unlikely
    makes it think no more often. Once the answer has begun, no control token may come but one that ends it.
    """

    def __init__(self, matcher: Matcher, tokenizer: Tokenizer, stop: frozenset[int], mode: Mode) -> None:
        """`stop` ends the generation. `mode` is that of the `Prompt`."""
        control = tokenizer.control_tokens
        self._matcher = matcher
        self._think = control.get(THINK)
        self._think_end = control.get(THINK_END)
        self._direct = control.get(DIRECT)
        self._in_thought = mode == "think" and self._think_end is not None
        self._open = mode == "auto"  # whether to think is the model's choice still
        self._free = np.ones(tokenizer.vocab_size, dtype=np.bool_)
        self._free[list(stop)] = False

    @property
    def complete(self) -> bool:
        """The answer is as long as it can be: nothing may follow but the end."""
        return not self._in_thought and self._matcher.complete

    def draw(self, logits: NDArray[np.float32], draw: Draw) -> int:
        """The next token. Raises EngineError as `Matcher.allowed`, and as `draw`."""
        if self._in_thought:
            return draw(logits, self._free)
        if self._open:
            token_id = draw(logits, None)
            if token_id in (self._think, self._direct):
                return token_id
        return draw(logits, self._matcher.allowed())

    def observe(self, token_id: int) -> None:
        """Take a token that was drawn, or forced to close a thought; not one that ends the generation."""
        opening, self._open = self._open, False
        if self._in_thought:
            self._in_thought = token_id != self._think_end
        elif opening and token_id in (self._think, self._direct):
            self._in_thought = token_id == self._think
        else:
            self._matcher.advance(token_id)
