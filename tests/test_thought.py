"""Thought and answer are told apart by token id and mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from phisight.prompt import Mode
from phisight.thought import Channel, ThoughtSplitter
from phisight.tokenizer import Tokenizer

THINK, END, DIRECT = 350, 351, 348


def feed(mode: Mode, ids: list[int]) -> tuple[list[Channel | None], ThoughtSplitter]:
    splitter = ThoughtSplitter(THINK, END, DIRECT, mode)
    return [splitter.feed(id_) for id_ in ids], splitter


def test_auto_with_a_thought() -> None:
    channels, splitter = feed("auto", [THINK, 1, 2, END, 3])
    assert channels == [None, "thought", "thought", None, "answer"]
    assert (splitter.in_thought, splitter.thought_tokens, splitter.thought_closed) == (False, 2, True)


def test_auto_with_a_direct_answer() -> None:
    channels, splitter = feed("auto", [DIRECT, 1, 2])
    assert channels == [None, "answer", "answer"]
    assert (splitter.in_thought, splitter.thought_tokens, splitter.thought_closed) == (False, 0, False)


def test_auto_with_neither() -> None:
    assert feed("auto", [1, 2])[0] == ["answer", "answer"]


def test_think_begins_inside_the_thought() -> None:
    channels, splitter = feed("think", [1, 2, END, 3])
    assert channels == ["thought", "thought", None, "answer"]
    assert (splitter.in_thought, splitter.thought_tokens, splitter.thought_closed) == (False, 2, True)


def test_think_repeated_by_the_model_changes_nothing() -> None:
    assert feed("think", [THINK, 1, END, 2])[0] == [None, "thought", None, "answer"]


def test_a_thought_that_never_closes() -> None:
    channels, splitter = feed("think", [1, 2])
    assert channels == ["thought", "thought"]
    assert (splitter.in_thought, splitter.thought_tokens, splitter.thought_closed) == (True, 2, False)


def test_nothink_is_an_answer_from_the_start() -> None:
    channels, splitter = feed("nothink", [1, END, 2])
    assert channels == ["answer", None, "answer"]  # an end without a thought is not shown and ends nothing
    assert (splitter.in_thought, splitter.thought_closed) == (False, False)


def test_a_later_think_opens_a_thought_again() -> None:
    splitter = ThoughtSplitter(THINK, END, DIRECT, "auto")
    assert [splitter.feed(id_) for id_ in [THINK, 1, END, 2, THINK, 3]] == [
        None, "thought", None, "answer", None, "thought",
    ]  # fmt: skip
    assert (splitter.in_thought, splitter.thought_tokens, splitter.thought_closed) == (True, 2, False)
    assert [splitter.feed(id_) for id_ in [END, 4]] == [None, "answer"]
    assert splitter.thought_closed


def test_a_direct_token_within_a_thought_is_not_shown_and_ends_nothing() -> None:
    assert feed("think", [1, DIRECT, 2])[0] == ["thought", None, "thought"]


@pytest.mark.parametrize("mode", ["auto", "nothink"])
def test_without_control_tokens_all_is_answer(mode: Mode) -> None:
    splitter = ThoughtSplitter(None, None, None, mode)
    assert [splitter.feed(id_) for id_ in [THINK, 1, END]] == ["answer", "answer", "answer"]


def test_a_quoted_tag_ends_nothing(golden: Path) -> None:
    tokenizer = Tokenizer.from_file(golden / "tiny_model" / "tokenizer.json")
    quoted = tokenizer.encode("write </think> here", parse_special=False)
    splitter = ThoughtSplitter.for_tokenizer(tokenizer, "think")
    assert {splitter.feed(id_) for id_ in quoted} == {"thought"}
    assert splitter.thought_tokens == len(quoted) == 19  # a token a byte
    assert splitter.feed(351) is None
    assert splitter.feed(quoted[0]) == "answer"
