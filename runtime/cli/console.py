"""What a command says, and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["Console", "ProgressBar"]


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


class Console:
    """The two streams of a command. With `as_json`, exactly one document goes to standard output."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        for stream in (sys.stdout, sys.stderr):
            # A character that the terminal's encoding lacks must not end an answer.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        warnings.showwarning = _show_warning

    def write(self, text: str) -> None:
        """Text on standard output as it comes, without a newline; on standard error with --json."""
        stream = sys.stderr if self.as_json else sys.stdout
        stream.write(text)
        stream.flush()

    def line(self, text: str = "") -> None:
        """A line of the result."""
        self.write(text + "\n")

    def aside(self, text: str) -> None:
        """Text on standard error as it comes, dim on a terminal: what the model thinks."""
        dim = sys.stderr.isatty()
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """A line on standard error."""
        print(text, file=sys.stderr, flush=True)

    def document(self, data: Any) -> None:
        """The one JSON document of a command that was asked for JSON."""
        print(json.dumps(data, ensure_ascii=True, indent=1), flush=True)

    @contextmanager
    def progress(self, what: str, total: int, unit: str, *, scale: bool = True) -> Iterator[ProgressBar]:
        """A progress bar on standard error, if that is a terminal."""
        from tqdm import tqdm

        with tqdm(
            total=total, desc=what, unit=unit, unit_scale=scale, disable=None, leave=False, file=sys.stderr
        ) as bar:
            yield ProgressBar(bar)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line for the user: what it says, not where in the code it was raised."""
    print(f"phisight: note: {message}", file=sys.stderr, flush=True)
