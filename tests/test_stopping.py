"""Stop texts: where the text is cut does not depend on the pieces in which it comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phisight.stopping import StopTexts

LETTERS = "ab"  # few, so that stop texts are found and overlap
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)
piece_lists = st.lists(st.text(LETTERS, max_size=5), max_size=12)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is to be shown of a text, character by character, and whether a stop text is in it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(deadline=None)
@given(stops=stop_lists, pieces=piece_lists)
def test_the_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    follower = StopTexts(stops)
    shown = "".join(follower.push(piece) for piece in pieces) + follower.flush()
    assert (shown, follower.found) == cut("".join(pieces), stops)


@settings(deadline=None)
@given(stops=stop_lists, pieces=piece_lists)
def test_only_the_beginning_of_a_stop_text_is_held_back(stops: list[str], pieces: list[str]) -> None:
    follower = StopTexts(stops)
    text = shown = ""
    for piece in pieces:
        shown += follower.push(piece)
        text += piece
        if follower.found:
            return
        beginnings = [stop[:size] for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        assert len(text) - len(shown) == max(map(len, beginnings), default=0)
        assert text.startswith(shown)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["</s>"], ["one", "</", "s", ">", "two"], "one"),  # over several pieces
        (["</s>"], ["a </b", "> c"], "a </b> c"),  # a beginning that goes on otherwise
        (["aab"], ["aa", "ab"], "a"),  # the beginning begins again within itself
        (["abab"], ["aba", "aabab"], "abaa"),
        (["world", "o w"], ["hello world"], "hell"),  # the one that is complete first
        (["b", "ab"], ["xab"], "x"),  # at one place the longest
        (["abc", "b"], ["xabc"], "xa"),  # complete before the longer one is, also in one piece
        (["STOP"], ["STOP"], ""),
        (["."], ["1", ".", "2."], "1"),
        ([], ["all", " of it"], "all of it"),
        (["日本"], ["x日", "曜日本"], "x日曜"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: str) -> None:
    follower = StopTexts(stops)
    assert "".join(follower.push(piece) for piece in pieces) + follower.flush() == shown


def test_what_was_held_back_comes_once() -> None:
    follower = StopTexts(["END"])
    assert follower.push("the EN") == "the "
    assert follower.flush() == "EN"
    assert follower.flush() == ""
    assert not follower.found


def test_nothing_comes_after_a_stop_text() -> None:
    follower = StopTexts(["END"])
    assert follower.push("the END, or not") == "the "
    assert follower.found
    assert follower.push("END") == follower.push("more") == follower.flush() == ""
