"""Commands whose packages come with an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phisight.errors import EngineError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports in this block that fail become an error that names the extra. Raises EngineError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(f'this command needs the package {error.name}: pip install "phisight[{extra}]"') from None
