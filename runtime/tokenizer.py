"""Text to token ids and back, from a checkpoint's `tokenizer.json`.

The `tokenizers` library does the work; this module adds what it lacks. Text can be encoded so that it never
becomes a control token, and ids can be decoded one by one without splitting a character.

A *control token* is an added token that has the `special` flag or whose content has the form `<...>`. The
second half is needed: Phi-4's `<think>` and `</think>` do not carry the flag. Other added tokens (such as a
number with a token of its own) are part of the ordinary vocabulary and are matched in any text.

Formats: `tokenizer.json` of huggingface/tokenizers; the byte alphabet is that of GPT-2's byte-level BPE.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import tokenizers
from tokenizers import decoders, models

from phisight.errors import TokenizerError

__all__ = ["IncrementalDecoder", "Tokenizer", "lone_surrogate"]

# Unicode's White_Space, on which the strip flags of `tokenizers` act; `str.isspace` has U+001C..U+001F too.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
WHITE_SPACE_RUN = re.compile(f"[{WHITE_SPACE}]*")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte: a visible Latin-1 character stands for itself, other bytes for U+0100 and up, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = byte_alphabet()


def is_control(token: tokenizers.AddedToken) -> bool:
    """The rule of the module's docstring."""
    return token.special or (token.content.startswith("<") and token.content.endswith(">"))


def lone_surrogate(text: str) -> str | None:
    """The first lone surrogate of `text`, as U+XXXX, if there is one. Such a string is not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


class Tokenizer:
    """A byte-level BPE tokenizer. Nothing is added to a text (no BOS) and nothing is cut."""

    def __init__(self, library: tokenizers.Tokenizer, name: str = "tokenizer.json") -> None:
        """Wrap `library`; `name` is what errors call it.

        Raises TokenizerError for anything but byte-level BPE without a normalizer.
        """
        self._name = name
        if not isinstance(library.model, models.BPE):
            raise TokenizerError(f"{name}: the model is {type(library.model).__name__}, only BPE is supported")
        if not isinstance(library.decoder, decoders.ByteLevel):
            found = type(library.decoder).__name__ if library.decoder else "none"
            raise TokenizerError(f"{name}: the decoder is {found}, only ByteLevel is supported")
        if library.normalizer is not None:
            found = type(library.normalizer).__name__
            raise TokenizerError(f"{name}: the normalizer is {found}, only tokenizers without one are supported")
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._added: dict[int, tokenizers.AddedToken] = library.get_added_tokens_decoder()
        self._vocab_size = max(library.get_vocab_size(with_added_tokens=False), max(self._added, default=-1) + 1)
        self._control = {token.content: id_ for id_, token in self._added.items() if is_control(token)}
        self._control_ids = frozenset(self._control.values())
        for content, id_ in self._control.items():
            if self._added[id_].single_word:
                raise TokenizerError(f"{name}: control token {content} has single_word, which is not supported")
        # Longest first: alternation takes the first that fits, and `tokenizers` takes the longest.
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._plain, self._plain_to_id = self._without_control_tokens()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises TokenizerError, naming the file, if it is missing, damaged or not byte-level BPE.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: the tokenizer cannot be read: {error.strerror or error}") from error
        try:
            library = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises ValueError or bare Exception
            raise TokenizerError(f"{path}: not a usable tokenizer.json: {' '.join(str(error).split())}") from error
        return cls(library, str(path))

    def _without_control_tokens(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same tokenizer without its control tokens, and its ids that differ from the real ones.

        It shares the model, so it costs next to nothing. The library numbers added tokens itself.
        """
        plain = tokenizers.Tokenizer(self._library.model)
        plain.pre_tokenizer = self._library.pre_tokenizer
        ordinary = {id_: token for id_, token in self._added.items() if id_ not in self._control_ids}
        plain.add_tokens(list(ordinary.values()))
        id_of_content = {token.content: id_ for id_, token in ordinary.items()}
        numbering = {own: id_of_content[token.content] for own, token in plain.get_added_tokens_decoder().items()}
        return plain, {own: id_ for own, id_ in numbering.items() if own != id_}

    @property
    def vocab_size(self) -> int:
        """Highest id + 1. The model's own vocabulary may be larger."""
        return self._vocab_size

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Content -> id of every control token."""
        return MappingProxyType(self._control)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its content, e.g. `<|im_end|>`."""
        id_: int | None = self._library.token_to_id(token)
        return id_

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `parse_special=True` reads control tokens out of the text; `False` takes all of it as plain text.
        Raises TokenizerError for text that is not valid Unicode (it holds half of a surrogate pair).
        """
        if (found := lone_surrogate(text)) is not None:
            raise TokenizerError(f"the text holds {found}, half of a surrogate pair: decode it properly")
        library = self._library if parse_special else self._plain
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        if parse_special:
            return ids
        if self._plain_to_id:
            ids = [self._plain_to_id.get(id_, id_) for id_ in ids]
        if not self._control_ids.isdisjoint(ids):  # a vocabulary whose own merges lead to a control token
            raise TokenizerError(f"{self._name}: plain text becomes a control token: the merges are not usable")
        return ids

    def split_control(self, text: str) -> Iterator[str | int]:
        """Cut `text` at its control tokens: their ids, and between them stretches of plain text, none empty.

        Encoding each stretch as plain text gives the ids of `encode(text, parse_special=True)`: the longest
        token at the leftmost place wins, and its lstrip and rstrip flags swallow the white space beside it.
        """
        position = 0
        for match in self._control_pattern.finditer(text):
            id_ = self._control[match[0]]
            token = self._added[id_]
            stretch = text[position : match.start()]
            if token.lstrip:
                stretch = stretch.rstrip(WHITE_SPACE)
            if stretch:
                yield stretch
            yield id_
            position = match.end()
            if token.rstrip and (spaces := WHITE_SPACE_RUN.match(text, position)):
                position = spaces.end()
        if position < len(text):
            yield text[position:]

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for: part of a character, perhaps; UTF-8 for an added token.

        Raises TokenizerError for an id that the tokenizer does not have, as a model with a larger vocabulary
        may produce: such an id has no text.
        """
        if (added := self._added.get(id_)) is not None:
            content: str = added.content
            return content.encode("utf-8")
        symbols: str | None = self._library.id_to_token(id_) if 0 <= id_ < self.vocab_size else None
        if symbols is None:
            raise TokenizerError(
                f"token id {id_} is not in {self._name} (vocabulary of {self.vocab_size}): "
                "use the tokenizer of the model's own checkpoint"
            )
        try:
            return bytes(BYTE_OF[symbol] for symbol in symbols)
        except KeyError as error:
            raise TokenizerError(f"{self._name}: token {id_} ({symbols!r}) is not byte-level") from error

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control tokens out.

        Raises TokenizerError for an id that the tokenizer does not have.
        """
        shown = (id_ for id_ in ids if not (skip_special and id_ in self._control_ids))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")


class IncrementalDecoder:
    """Turns a stream of ids into text, whole characters only. All pieces joined equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that this token completes; may be empty. Raises TokenizerError for an unknown id."""
        return self._utf8.decode(self._tokenizer.token_bytes(id_))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. Then it is as new."""
        return self._utf8.decode(b"", final=True)
