"""New directories that stand under their final name only when they are complete.

One that takes long to fill stays beside as `.NAME.partial`, with a journal `.NAME.journal`, when it is interrupted.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from phisight.errors import InputError, PhisightError
from phisight.export.journal import Journal

__all__ = ["check_name", "check_place", "continued_directory", "new_directory", "partial_directory"]

SLACK = 64 << 20
"""Bytes of disk wanted beyond the weights: graphs, tables, tokenizer."""


def check_place(out: Path, needed: int, *, kind: str, ours: Callable[[Path], bool], force: bool) -> None:
    """Refuse what cannot end well: an existing directory without `force`, a file, too little room on the disk.

    `needed` bytes of weights are to be written. `force` replaces only an empty directory or one that `ours` knows as
    of the same `kind`: it must never cost anybody other files. Raises InputError.
    """
    check_name(out, kind=kind, ours=ours, force=force)
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    there = _size(partial_directory(out))
    if needed - there + SLACK > free:
        more = "" if not there else " more"
        raise InputError(
            f"{out} needs {(needed - there + SLACK) / 1e9:.2f} GB{more}, but {parent} has {free / 1e9:.2f} GB free: "
            "make room or choose another disk"
        )


def check_name(out: Path, *, kind: str, ours: Callable[[Path], bool], force: bool) -> None:
    """`check_place` without the disk. Raises InputError."""
    if out.exists() and not force:
        raise InputError(f"{out} exists: choose another name, or replace it with --force")
    if out.exists() and not (out.is_dir() and (ours(out) or not any(out.iterdir()))):
        raise InputError(f"{out} is neither {kind} nor empty, so --force does not replace it: choose another name")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory: make it first, or choose another place for {out.name}")


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


@contextmanager
def continued_directory(
    out: Path, identity: Mapping[str, str], needed: int, tell: Callable[[str], None]
) -> Iterator[tuple[Path, Journal]]:
    """The directory that becomes `out`, new or as an interrupted run of the same `identity` left it, and its journal.

    Interrupted, or with a disk that fails, it stays as it is; an InputError removes it. `needed` bytes
    are written in all. `tell` gets a line on what was found. Raises PhisightError for a disk that is full or not
    writable, naming the bytes that are missing, and InputError if another export fills the same directory; `out` is
    then as it was.
    """
    work, place = partial_directory(out), _beside(out, "journal")
    try:
        with Journal.open(place, identity) as journal:
            if work.exists() and not journal.marks:
                shutil.rmtree(work)
            if journal.changed:
                tell(f"the begun export of {out} had another {' and '.join(journal.changed)}: it starts anew")
            elif journal.marks and work.exists():
                there = f"{_size(work) / 1e9:.2f} of {needed / 1e9:.2f} GB"
                tell(f"continuing the begun export of {out}: {there} are there")
            work.mkdir(exist_ok=True)
            try:
                yield work, journal
            except InputError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            _replace(work, out)
    except OSError as error:
        raise PhisightError(
            f"writing {out} failed: {error.strerror or error}: {_way_out(error, out, needed - _size(work))}"
        ) from error
    finally:
        if not work.exists():
            place.unlink(missing_ok=True)


def _way_out(error: OSError, out: Path, missing: int) -> str:
    parent = out.absolute().parent
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return "what is written stays beside it, and the same command goes on from there"
    return (
        f"{max(0, missing):,} bytes are still to be written, {parent} has {shutil.disk_usage(parent).free:,} free: "
        "make room and run it again, it goes on from there"
    )


def partial_directory(out: Path) -> Path:
    """Where `continued_directory` keeps what is not complete."""
    return _beside(out, "partial")


def _beside(out: Path, kind: str) -> Path:
    return out.absolute().with_name(f".{out.name}.{kind}")


def _size(directory: Path) -> int:
    """Bytes of the files in it; 0 if it is not there."""
    return sum(path.stat().st_size for path in directory.iterdir()) if directory.is_dir() else 0


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
