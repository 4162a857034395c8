"""The tokenizer and the chat template that a GGUF file holds.

The file lists the tokens in the order of their ids with a type each, and the merges of the byte-level BPE. How text is
split before the merges is a name (`tokenizer.ggml.pre`), whose pattern llama.cpp and this module know. Not in the file
are the flags by which a token swallows the white space beside it: files exported here carry them under keys of their
own; for others, control tokens and the two marks of a thought are taken to have both, as Phi-4's tokenizer does.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The pattern is that of cl100k_base (tiktoken).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from phisight.errors import TokenizerError
from phisight.gguf_file import MetadataValue
from phisight.prompt import THINK, THINK_END
from phisight.tokenizer import BYTE_OF, Tokenizer

__all__ = ["LSTRIP", "RSTRIP", "template_from_gguf", "tokenizer_from_gguf"]

LSTRIP = "phisight.tokenizer.lstrip"
RSTRIP = "phisight.tokenizer.rstrip"
"""Keys of our own: the ids whose token swallows the white space before or behind it, int32."""

SPLIT_PATTERNS = {
    "dbrx": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}
"""llama.cpp's name of a pre-tokenizer -> its pattern. It finds this model's to be that of dbrx, cl100k_base."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
NEVER_IN_UTF8 = frozenset(symbol for symbol, byte in BYTE_OF.items() if byte in (0xC0, 0xC1) or byte >= 0xF5)


def tokenizer_from_gguf(metadata: Mapping[str, MetadataValue], name: str = "the GGUF file") -> Tokenizer:
    """The tokenizer of a file's metadata; `name` is what errors call the file.

    Raises TokenizerError for a kind of tokenizer that is not supported, and for lists that do not fit each other.
    """
    _expect(metadata, "tokenizer.ggml.model", ["gpt2"], name)
    pre = _expect(metadata, "tokenizer.ggml.pre", list(SPLIT_PATTERNS), name)
    tokens = _strings(metadata, "tokenizer.ggml.tokens", name)
    types = _integers(metadata, "tokenizer.ggml.token_type", name)
    if len(types) != len(tokens):
        raise TokenizerError(f"{name} has {len(tokens)} tokens, but {len(types)} token types: it is damaged")
    odd = sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED})
    if odd:
        raise TokenizerError(f"{name} has tokens of type {odd[0]}, which byte-level BPE does not have")
    while types and types[-1] == UNUSED:  # padding up to the size of the embedding table
        types.pop()
    vocabulary = {token: id_ for id_, token in enumerate(tokens[: len(types)])}
    if len(vocabulary) < len(types):
        raise TokenizerError(f"{name} has {len(types) - len(vocabulary)} tokens twice: it is damaged")
    merges = _merges(_strings(metadata, "tokenizer.ggml.merges", name), vocabulary, name)
    try:
        library = LibraryTokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{name}: the tokens and merges do not fit: {' '.join(str(error).split())}") from error
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pre]), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_tokens(_added_tokens(metadata, tokens, types, name))
    return Tokenizer(library, name)


def template_from_gguf(metadata: Mapping[str, MetadataValue], name: str = "the GGUF file") -> str | None:
    """The source of the chat template, or None if the file has none. Raises TokenizerError if it is not text."""
    template = metadata.get("tokenizer.chat_template")
    if template is None or isinstance(template, str):
        return template
    raise TokenizerError(f"{name}: tokenizer.chat_template is not a string: it is damaged")


def _merges(lines: Sequence[str], vocabulary: Mapping[str, int], name: str) -> list[tuple[str, str]]:
    """Pairs of symbols, best first.

    llama.cpp refuses a file without merges, so a tokenizer that has none is written with one that can never apply: of
    bytes that do not occur in UTF-8, leading to no token. Such a merge is left out.
    """
    merges = []
    for line in lines:
        left, space, right = line.partition(" ")
        if left + right in vocabulary and space and left in vocabulary and right in vocabulary:
            merges.append((left, right))
        elif NEVER_IN_UTF8.isdisjoint(line):
            raise TokenizerError(f"{name}: the merge {line!r} does not lead from two tokens to a third: it is damaged")
    return merges


def _added_tokens(
    metadata: Mapping[str, MetadataValue], tokens: Sequence[str], types: Sequence[int], name: str
) -> list[AddedToken]:
    """Control and user-defined tokens. Their contents are in the vocabulary too, which gives them their ids."""
    added = [id_ for id_, type_ in enumerate(types) if type_ in (CONTROL, USER_DEFINED)]
    usual = [id_ for id_ in added if types[id_] == CONTROL or tokens[id_] in (THINK, THINK_END)]
    lstrip = frozenset(_integers(metadata, LSTRIP, name) if LSTRIP in metadata else usual)
    rstrip = frozenset(_integers(metadata, RSTRIP, name) if RSTRIP in metadata else usual)
    if "" in (tokens[id_] for id_ in added):
        raise TokenizerError(f"{name} has an empty control token: it is damaged")
    return [
        AddedToken(
            tokens[id_],
            lstrip=id_ in lstrip,
            rstrip=id_ in rstrip,
            normalized=False,
            special=types[id_] == CONTROL,
        )
        for id_ in added
    ]


def _expect(metadata: Mapping[str, MetadataValue], key: str, supported: Sequence[str], name: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str) or value not in supported:
        raise TokenizerError(
            f"{name}: {key} is {_shown(value)}, supported is {' or '.join(supported)}: use a GGUF file of Phi-4"
        )
    return value


def _strings(metadata: Mapping[str, MetadataValue], key: str, name: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise TokenizerError(f"{name}: {key} is {_shown(value)}, wanted a list of strings: it is damaged or incomplete")
    return value


def _integers(metadata: Mapping[str, MetadataValue], key: str, name: str) -> list[int]:
    value = metadata.get(key)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        raise TokenizerError(
            f"{name}: {key} is {_shown(value)}, wanted a list of integers: it is damaged or incomplete"
        )
    integers: list[int] = value.tolist()
    return integers


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return repr(value)[:80] if isinstance(value, str | int | float) else "a list"
