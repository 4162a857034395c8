"""The limit of the context, checked before any work and told with the numbers."""

from __future__ import annotations

from phisight.errors import PromptError

__all__ = ["check_context"]


def check_context(text: int, images: int, context: int, *, answer: bool = True, max_tokens: int | None = None) -> None:
    """Refuse a prompt that does not fit.

    text and images are the prompt's tokens; with `answer` at least one token more must have room, and `max_tokens`, how
    many were asked for, is named. Raises PromptError.
    """
    if text + images + answer <= context:
        return
    asked = "" if max_tokens is None else f" with {max_tokens} new tokens asked for"
    needs = " and an answer needs at least 1 of them" if answer else ""
    raise PromptError(
        f"the prompt takes {text + images} positions ({text} text and {images} image tokens){asked}, "
        f"but the context holds {context}{needs}: use fewer patches per image, a shorter prompt or a larger context"
    )
