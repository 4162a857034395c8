"""What a command says, and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Console", "OutputError", "ProgressBar"]


class OutputError(Exception):
    """A standard stream cannot be written."""

    def __init__(self, stream: TextIO, error: OSError) -> None:
        super().__init__(f"{stream.name} cannot be written: {error.strerror or error}")
        # As with `| head`; Windows calls it EINVAL.
        self.reader_gone = error.errno in (errno.EPIPE, errno.EINVAL)
        self._stream = stream

    def release(self) -> None:
        """Point the stream elsewhere, or Python complains at its end of what could not be written."""
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class ProgressBar:
    """Counts up to a total; shows rate and remaining time on a terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def add(self, amount: int) -> None:
        self._bar.update(amount)

    def set(self, done: int, total: int) -> None:
        """Where the caller counts itself."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def tell(self, text: str) -> None:
        """What to show behind the bar when it is drawn next."""
        self._bar.set_postfix_str(text, refresh=False)


class Console:
    """The two streams of a command. With `as_json`, exactly one document goes to standard output.

    All that writes raises OutputError, and nothing stays in a buffer.
    """

    def __init__(self) -> None:
        self.as_json = False  # until the command line is read
        self._unfinished: set[TextIO] = set()
        for stream in (sys.stdout, sys.stderr):
            # A character that the terminal's encoding lacks must not end an answer.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        warnings.showwarning = _show_warning

    def write(self, text: str, *, dim: bool = False) -> None:
        """Text on standard output as it comes, without a newline; on standard error with --json. Files get no dim."""
        stream = sys.stderr if self.as_json else sys.stdout
        self._put(stream, text, dim=dim and stream.isatty())

    def line(self, text: str = "") -> None:
        """A line of the result."""
        self.write(text + "\n")

    def aside(self, text: str) -> None:
        """Text on standard error as it comes, dim on a terminal: what the model thinks."""
        self._put(sys.stderr, text, dim=sys.stderr.isatty())

    def note(self, text: str) -> None:
        """A line on standard error."""
        self._put(sys.stderr, text + "\n")

    def end_lines(self) -> None:
        """End the lines that text as it came has left open: what comes next has nothing to do with it."""
        for stream in tuple(self._unfinished):
            self._put(stream, "\n")

    def document(self, data: Any) -> None:
        """The one JSON document of a command that was asked for JSON."""
        self._put(sys.stdout, json.dumps(data, ensure_ascii=True, indent=1) + "\n")

    @contextmanager
    def progress(self, what: str, total: int, unit: str, *, scale: bool = True) -> Iterator[ProgressBar]:
        """A progress bar on standard error, if that is a terminal."""
        from tqdm import tqdm

        with tqdm(
            total=total, desc=what, unit=unit, unit_scale=scale, disable=None, leave=False, file=sys.stderr
        ) as bar:
            yield ProgressBar(bar)

    def _put(self, stream: TextIO, text: str, *, dim: bool = False) -> None:
        if text.endswith("\n"):
            self._unfinished.discard(stream)
        elif text:
            self._unfinished.add(stream)
        try:
            stream.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
            stream.flush()
        except OSError as error:
            raise OutputError(stream, error) from error


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line for the user: what it says, not where in the code it was raised."""
    with suppress(OSError):  # it is no reason to fail if nobody reads it
        print(f"phisight: note: {message}", file=sys.stderr, flush=True)
