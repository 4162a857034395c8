"""Constraints by llguidance: https://github.com/guidance-ai/llguidance (extra `schema`).

llguidance follows bytes, not characters: it is given the bytes of every token of our tokenizer. Control tokens have
none, but for those that end an answer: no text is made of them.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from phisight.constraint import Constraint, Mask
from phisight.errors import EngineError, InputError, TokenizerError
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Compiler", "ConstraintNotice", "LlguidanceMatcher", "check_constraint", "is_installed"]

WHITE_SPACE = r"(?: ?|\n[ \t]{0,32})"
"""Between JSON's tokens: enough for any usual layout, and a model cannot go on with blanks for ever."""


def is_installed() -> bool:
    """Whether llguidance is there to be imported."""
    return find_spec("llguidance") is not None


class ConstraintNotice(UserWarning):
    """Something in a schema or grammar is taken otherwise than it stands there."""


class Compiler:
    """Compiles constraints for one tokenizer. To make it takes about a second with 100 000 tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: frozenset[int]) -> None:
        """`stop`: ids that end an answer. Raises EngineError without llguidance."""
        llguidance = _llguidance()
        self._control = sorted(set(tokenizer.control_tokens.values()) - stop)
        self._size = tokenizer.vocab_size
        vocabulary = _Vocabulary(tokenizer, frozenset(self._control), stop)
        self._tokenizer: LLTokenizer = llguidance.LLTokenizer(vocabulary, self._size, sorted(stop))

    def compile(self, constraint: Constraint) -> LlguidanceMatcher:
        """A matcher at the beginning of an answer. Raises InputError for a constraint that cannot be used."""
        matcher = _llguidance().LLMatcher(self._tokenizer, _grammar(constraint), log_level=0)
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        for notice in matcher.get_grammar_warnings():
            warnings.warn(f"{constraint.name}: {_line(notice)}", ConstraintNotice, stacklevel=2)
        return LlguidanceMatcher(matcher, self._size, np.array(self._control, dtype=np.int64))


class LlguidanceMatcher:
    """A `Matcher`. The vocabulary has `size` tokens; `control` are ids that are never allowed."""

    def __init__(self, matcher: LLMatcher, size: int, control: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._matcher = matcher
        self._size = size
        self._control = control
        self._bits = np.zeros(-(-size // 32), dtype=np.int32)  # a bit for each id, the lowest first

    def allowed(self) -> Mask:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise EngineError(f"the answer cannot go on under its grammar: {_line(self._matcher.get_error())}")
        octets = self._bits.view(np.uint8)
        mask = np.unpackbits(octets, count=self._size, bitorder="little").view(np.bool_)
        mask[self._control] = False  # a grammar can name tokens by their ids
        if not mask.any():
            raise EngineError("the answer cannot go on under its grammar: no token may follow")
        return mask

    def advance(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise EngineError(f"token {token_id} does not fit the grammar: {_line(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()


def check_constraint(constraint: Constraint) -> None:
    """What can be told without a tokenizer, before a large model is opened.

    Raises InputError for a constraint that cannot be used, EngineError without llguidance.
    """
    error = _llguidance().LLMatcher.validate_grammar(_grammar(constraint))
    if error and not error.startswith("WARNING"):
        raise _refused(constraint, error)


class _Vocabulary:
    """What llguidance asks of a tokenizer: see TokenizerWrapper in its Python package."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, control: frozenset[int], stop: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = sorted(stop)
        self.eos_token_id = self.special_token_ids[0]
        self.tokens = [b"" if id_ in control else self._bytes(id_) for id_ in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, parse_special=False)

    def _bytes(self, id_: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(id_)
        except TokenizerError:  # a gap in the vocabulary
            return b""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise EngineError(
            f'a schema or grammar needs the package llguidance ({error}): pip install "phisight[schema]"'
        ) from None
    return llguidance


def _grammar(constraint: Constraint) -> str:
    """llguidance's own form. What a schema says under "x-guidance" goes before the white space set here."""
    matcher = _llguidance().LLMatcher
    if constraint.kind == "lark":
        return str(matcher.grammar_from_lark(constraint.text))
    return str(matcher.grammar_from_json_schema(constraint.text, defaults={"whitespace_pattern": WHITE_SPACE}))


def _refused(constraint: Constraint, error: str) -> InputError:
    hint = '; options of llguidance go under the key "x-guidance" of the schema' if "option" in error else ""
    return InputError(f"the {constraint.name} cannot be used: {_line(error)}{hint}")


def _line(message: str) -> str:
    """llguidance's messages in one line, without the parser's state."""
    return " ".join(message.partition("<state>")[0].split())
