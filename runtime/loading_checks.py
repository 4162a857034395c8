"""Checks that every way of opening a model makes."""

from __future__ import annotations

from pathlib import Path

from phisight.config import ModelConfig
from phisight.errors import ModelDirError, PromptError
from phisight.tokenizer import Tokenizer

__all__ = ["check_vocabulary", "checked_context"]


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Raises ModelDirError if the tokenizer has more tokens than the decoder."""
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ModelDirError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, "
            f"the decoder {config.decoder.vocab_size}: they belong to different models"
        )


def checked_context(context: int | None, most: int) -> int:
    """The context asked for, or the model's own. Raises PromptError if it is out of range."""
    if context is None:
        return most
    if not 1 < context <= most:
        raise PromptError(f"context is {context} positions, wanted 2 to the model's {most}")
    return context
