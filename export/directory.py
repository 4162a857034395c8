"""New directories that stand under their final name only when they are complete."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phisight.errors import InputError, PhisightError

__all__ = ["check_place", "new_directory"]

SLACK = 64 << 20
"""Bytes of disk wanted beyond the weights: graphs, tables, tokenizer."""


def check_place(out: Path, needed: int, *, kind: str, ours: Callable[[Path], bool], force: bool) -> None:
    """Refuse what cannot end well: an existing directory without `force`, a file, too little room on the disk.

    `needed` bytes of weights are to be written. `force` replaces only an empty directory or one that `ours` knows as
    of the same `kind`: it must never cost anybody other files. Raises InputError.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists: choose another name, or replace it with --force")
    if out.exists() and not (out.is_dir() and (ours(out) or not any(out.iterdir()))):
        raise InputError(f"{out} is neither {kind} nor empty, so --force does not replace it: choose another name")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory: make it first, or choose another place for {out.name}")
    free = shutil.disk_usage(parent).free
    if needed + SLACK > free:
        raise InputError(
            f"{out} needs {(needed + SLACK) / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free: "
            "make room or choose another disk"
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A new directory next to `out` that takes its name at the end, and disappears if anything goes wrong.

    Raises PhisightError for a disk that is full or not writable; `out` is then as it was.
    """
    work = _sibling(out, "partial")
    try:
        work.mkdir()
        yield work
        _replace(work, out)
    except OSError as error:
        raise PhisightError(f"writing {out} failed: {error.strerror or error}: make room and run it again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, out: Path) -> None:
    """Rename `work` to `out`. An older directory steps aside first, since no system renames over a full one."""
    if not out.exists():
        work.rename(out)
        return
    old = _sibling(out, "old")
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(out: Path, kind: str) -> Path:
    """A free name on the same disk, hidden, that says whose it is."""
    return out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.{kind}")
