"""Pictures that a command writes: PNG files, which replace another only if that is asked for."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from phisight.errors import InputError

__all__ = ["check_png", "write_png"]


def check_png(out: Path, *, force: bool) -> None:
    """That a picture may be written there, before any work. Raises InputError."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} does not end in .png: only PNG keeps every pixel as it is")
    if out.exists() and not force:
        raise InputError(f"{out} exists: choose another name, or replace it with --force")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no directory: make it, or choose another name for {out.name}")


def write_png(image: Image.Image, out: Path) -> None:
    """Write it whole or not at all. Raises InputError."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        image.save(partial, format="PNG")
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
