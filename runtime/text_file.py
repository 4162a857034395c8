"""Plain texts that people give."""

from __future__ import annotations

from pathlib import Path

from phisight.errors import InputError

__all__ = ["read_text_file"]


def read_text_file(path: Path) -> str:
    """The whole text, without a byte order mark. Raises InputError for a file that cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}: give a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 from byte {error.start} on: convert the text, or give a folder"
        ) from None
