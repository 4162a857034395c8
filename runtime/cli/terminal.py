"""What a terminal can show: whether it has half blocks, and in how many colours."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from phisight.cli.half_blocks import BLOCKS, Colours

__all__ = ["ColourChoice", "choose_colours"]

TRUE_COLOUR_TERMINALS = ("xterm-kitty", "xterm-ghostty", "alacritty", "foot", "wezterm")
"""Values of TERM, or how they begin: ssh hands TERM on, but not COLORTERM."""


@dataclass(frozen=True)
class ColourChoice:
    """In which colours pictures are shown, None for no pictures, and why."""

    colours: Colours | None
    reason: str


def choose_colours(stream: TextIO, environment: Mapping[str, str]) -> ColourChoice:
    """How pictures can be shown on a stream. Turns escape sequences on where a Windows console has them off."""
    term = environment.get("TERM", "")
    if not stream.isatty():
        return ColourChoice(None, "the output is no terminal")
    try:
        BLOCKS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ColourChoice(None, f"the terminal's encoding is {stream.encoding}, which has no half blocks")
    if term == "dumb":
        return ColourChoice(None, "TERM is dumb")
    if environment.get("NO_COLOR"):  # https://no-color.org: any text but an empty one
        return ColourChoice("mono", "NO_COLOR is set")
    if sys.platform == "win32":
        return _of_console(stream)
    else:
        return _of_environment(term, environment.get("COLORTERM", ""))


def _of_environment(term: str, colorterm: str) -> ColourChoice:
    if term.startswith("screen"):  # GNU screen takes 24-bit colours for something else, whatever runs around it
        return ColourChoice("256", f"TERM is {term}")
    if colorterm in ("truecolor", "24bit"):
        return ColourChoice("true", f"COLORTERM is {colorterm}")
    if term.startswith(TRUE_COLOUR_TERMINALS) or term.endswith("-direct"):
        return ColourChoice("true", f"TERM is {term}")
    if "256color" in term:
        return ColourChoice("256", f"TERM is {term}")
    return ColourChoice("mono", f"TERM is {term}" if term else "TERM is not set")


if sys.platform == "win32":
    import ctypes
    import msvcrt

    ENABLE_VIRTUAL_TERMINAL_PROCESSING = 0x0004

    def _of_console(stream: TextIO) -> ColourChoice:
        if _sequences_on(stream):  # since Windows 10, with 24-bit colours
            return ColourChoice("true", "the Windows console takes escape sequences")
        return ColourChoice("mono", "the Windows console takes no escape sequences")

    def _sequences_on(stream: TextIO) -> bool:
        """Whether the console behind the stream acts on escape sequences from now on."""
        try:
            handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))
        except (OSError, io.UnsupportedOperation):
            return False
        kernel, mode = ctypes.WinDLL("kernel32"), ctypes.c_uint32()
        return bool(
            kernel.GetConsoleMode(handle, ctypes.byref(mode))
            and kernel.SetConsoleMode(handle, mode.value | ENABLE_VIRTUAL_TERMINAL_PROCESSING)
        )
