"""Log-probabilities in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phisight.logprobs import TokenLogprob, TokenLogprobs
from phisight.tokenizer import Tokenizer

__all__ = ["logprobs_document"]


def logprobs_document(logprobs: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choice.logprobs`. A token that holds part of a character has U+FFFD in its text, and the part in its bytes."""
    content = []
    for entry in logprobs:
        likeliest = [_token(alternative, tokenizer) for alternative in entry.likeliest]
        content.append(_token(entry.drawn, tokenizer) | {"top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token.token_id)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": token.logprob}
