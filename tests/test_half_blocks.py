"""Pictures as text, and which terminals can show them."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import phisight
from phisight.cli.half_blocks import Colours, half_blocks, side_by_side
from phisight.cli.terminal import ColourChoice, choose_colours
from phisight.images import open_image

PRICE = Path(phisight.__file__).parent / "demo/pictures/price.png"
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def picture(*rows: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    return np.array(rows, np.uint8)


def plain(line: str) -> str:
    """A line without its escape sequences."""
    return re.sub(r"\x1b\[[\d;]*m", "", line)


def test_two_by_four_pixels() -> None:
    two_by_four = picture([RED, GREEN], [BLUE, WHITE], [BLACK, BLACK], [RED, RED])
    assert half_blocks(two_by_four, 80, 16) == [
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[38;2;0;255;0;48;2;255;255;255m▀\x1b[0m",
        "\x1b[38;2;0;0;0;48;2;255;0;0m▀▀\x1b[0m",  # a colour is said once
    ]
    assert half_blocks(two_by_four, 80, 16, "256") == [
        "\x1b[38;5;196;48;5;21m▀\x1b[38;5;46;48;5;231m▀\x1b[0m",
        "\x1b[38;5;16;48;5;196m▀▀\x1b[0m",
    ]


def test_an_odd_height_ends_on_the_terminals_own_background() -> None:
    three_high = picture([RED], [GREEN], [BLUE])
    assert half_blocks(three_high, 80, 16)[1] == "\x1b[38;2;0;0;255;49m▀\x1b[0m"
    assert half_blocks(three_high, 80, 16, "256")[1] == "\x1b[38;5;21;49m▀\x1b[0m"
    assert half_blocks(picture([WHITE], [BLACK], [WHITE]), 80, 16, "mono") == ["▀", "▀"]


def test_a_terminal_without_colours() -> None:
    assert half_blocks(picture([WHITE, BLACK, WHITE, BLACK], [BLACK, WHITE, WHITE, BLACK]), 80, 16, "mono") == ["▀▄█ "]
    assert half_blocks(picture([RED], [RED]), 80, 16, "mono") == [" "]  # nothing is brighter than the rest


def test_greys_of_the_palette_are_nearer_than_its_cube() -> None:
    # 18 is no level of the cube (0, 95, ...), but the second of the greys (8, 18, ...).
    assert half_blocks(picture([(18, 18, 18)]), 80, 16, "256") == ["\x1b[38;5;233;49m▀\x1b[0m"]


def test_a_shrunk_pixel_is_the_mean_of_what_it_covers() -> None:
    chequered = picture([BLACK, WHITE], [WHITE, BLACK])
    assert half_blocks(chequered, 1, 16) == ["\x1b[38;2;128;128;128;49m▀\x1b[0m"]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 100), st.integers(1, 20))
def test_no_picture_is_wider_or_higher_than_its_room(width: int, height: int, columns: int, rows: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    sizes = set()
    for colours in ("true", "256", "mono"):
        chosen: Colours = colours  # type: ignore[assignment]
        lines = half_blocks(pixels, columns, rows, chosen)
        widths = {len(plain(line)) for line in lines}
        assert len(widths) == 1
        sizes.add((widths.pop(), len(lines)))
    assert len(sizes) == 1
    shown_width, shown_rows = sizes.pop()
    assert 1 <= shown_width <= min(columns, width)
    assert 1 <= shown_rows <= min(rows, (height + 1) // 2)
    # The room is used: one side is as long as it can be.
    assert shown_width in (columns, width) or shown_rows == rows


def test_the_shape_is_kept() -> None:
    lines = half_blocks(np.asarray(open_image(PRICE)), 40, 16)
    height, width = np.asarray(open_image(PRICE)).shape[:2]
    assert abs(len(lines) * 2 / len(plain(lines[0])) - height / width) < 2 / 40


def test_two_pictures_side_by_side() -> None:
    left, right = half_blocks(picture([RED], [RED]), 9, 9), half_blocks(picture([BLUE], [BLUE]), 9, 9)
    assert side_by_side(left, right, 3) == [left[0] + "   " + right[0]]
    assert left[0].endswith("\x1b[0m")  # what is between them has no colour


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.skipif(sys.platform == "win32", reason="a Windows console is asked, not its environment")
@pytest.mark.parametrize(
    ("environment", "colours"),
    [
        ({"COLORTERM": "truecolor", "TERM": "xterm-256color"}, "true"),
        ({"COLORTERM": "24bit", "TERM": "xterm"}, "true"),
        ({"COLORTERM": "", "TERM": "xterm-256color"}, "256"),
        ({"TERM": "xterm-kitty"}, "true"),
        ({"TERM": "alacritty"}, "true"),
        ({"TERM": "xterm-direct"}, "true"),
        ({"TERM": "tmux-256color", "COLORTERM": "truecolor"}, "true"),
        ({"TERM": "screen.xterm-256color", "COLORTERM": "truecolor"}, "256"),
        ({"TERM": "linux"}, "mono"),
        ({"TERM": "screen"}, "256"),
        ({}, "mono"),
    ],
)
def test_colours_of_a_terminal(environment: dict[str, str], colours: str) -> None:
    choice = choose_colours(Terminal(), environment)
    assert choice.colours == colours
    assert choice.reason


def test_no_color_is_respected() -> None:
    wanted = {"COLORTERM": "truecolor", "TERM": "xterm"}
    assert choose_colours(Terminal(), wanted | {"NO_COLOR": "1"}) == ColourChoice("mono", "NO_COLOR is set")
    if sys.platform != "win32":
        assert choose_colours(Terminal(), wanted | {"NO_COLOR": ""}).colours == "true"  # as its page says


def test_where_no_picture_can_be_shown() -> None:
    wanted = {"COLORTERM": "truecolor", "TERM": "xterm"}
    assert choose_colours(Terminal(terminal=False), wanted) == ColourChoice(None, "the output is no terminal")
    for encoding in ("cp1252", "ascii"):
        choice = choose_colours(Terminal(encoding), wanted)
        assert choice.colours is None
        assert encoding in choice.reason
    assert choose_colours(Terminal("cp437"), wanted | {"NO_COLOR": "1"}).colours == "mono"  # it has the blocks
    assert choose_colours(Terminal(), wanted | {"TERM": "dumb"}) == ColourChoice(None, "TERM is dumb")
