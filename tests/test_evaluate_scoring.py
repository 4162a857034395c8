"""What an answer is worth, by hand-made values and by what must hold for all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phisight.evaluate.intervals import wilson_interval
from phisight.evaluate.scoring import BoxHit, Contains, Exact, Expected, Number, last_number
from phisight.tasks.question import Box, box_overlap, centre_inside, read_box


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Boxes inside the picture, their edges on a grid of thousandths."""
    x1, y1 = (draw(st.integers(0, 999)) for _ in range(2))
    x2, y2 = draw(st.integers(x1 + 1, 1000)), draw(st.integers(y1 + 1, 1000))
    return x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (Exact(("Open",)), " Open\n", True),
        (Exact(("Open",)), "open", False),
        (Exact(("Open",)), "Open.", False),
        (Exact(("yes", "Yes")), "Yes", True),
        (Contains(("red",)), "It is RED, I think.", True),
        (Contains(("red",)), "It is reddish.", False),
        (Contains(("red",)), "coloured", False),
        (Contains(("3",)), "There are 3.", True),
        (Contains(("3",)), "There are 13", False),
        (Contains(("3",)), "3.5", False),
        (Contains(("3",)), "1.3", False),
        (Contains(("the door", "door")), "a  Door\nopened", True),
        (Contains(("the  door",)), "The door", True),
        (Contains(("Straße",)), "STRASSE 5", True),
        (Contains(("cafe\u0301",)), "Caf\u00e9 Central", True),
        (Contains(("猫",)), "这是猫咪", True),  # no spaces between words
        (Contains(("$6.75",)), "It costs $6.75.", True),
        (Contains(("6.75",)), "It costs $16.75.", False),
        (Contains((".*",)), "anything", False),
        (Number(42), "The answer is 42.", True),
        (Number(42), "42 or 43", False),
        (Number(42), "forty-two", False),
        (Number(1234.5), "$1,234.50", True),
        (Number(4), "3,4", True),
        (Number(2345), "1,2345", True),
        (Number(-3), "so -3", True),
        (Number(-3), "so \u22123", True),
        (Number(5), "10-5", True),
        (Number(0.3), "0.2", False),
        (Number(0.3, tolerance=0.1), "0.2", True),
        (Number(0.3, tolerance=0.1), "0.19", False),
        (Number(45), "45 %", True),
        (Number(1500), "1.5e3", True),
        (Number(1), "", False),
    ],
)
def test_answers(expected: Expected, answer: str, right: bool) -> None:
    assert expected.judge(answer).right is right
    assert expected.judge(answer).overlap is None


@pytest.mark.parametrize(
    ("answer", "right", "overlap"),
    [
        ("[0.2, 0.2, 0.6, 0.4]", True, 1.0),
        ("It is at [0.2,0.2,0.4,0.4] and [0.8, 0.8, 0.9, 0.9].", True, 0.5),
        ("[0.6, 0.2, 1.0, 0.4]", False, 0.0),  # beside it
        ("[0.0, 0.2, 0.4, 0.4]", True, 1 / 3),  # the centre lies on the edge
        ("[0.0, 0.2, 0.39, 0.4]", False, 0.19 / 0.6),
        ("[0, 0, 0.8, 0.6]", True, 0.08 / 0.48),
        ("[0.6, 0.4, 0.2, 0.2]", True, 0.0),  # turned inside out
        ("0.2, 0.2, 0.6, 0.4", False, 0.0),
        ("[0.2, 0.2, 0.6]", False, 0.0),
        ("[0.2, 0.2.1, 0.6, 0.4]", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_boxes(answer: str, right: bool, overlap: float) -> None:
    verdict = BoxHit((0.2, 0.2, 0.6, 0.4)).judge(answer)
    assert verdict.right is right
    assert verdict.overlap == pytest.approx(overlap)


@given(boxes(), boxes())
def test_overlap_is_a_share_and_symmetrical(a: Box, b: Box) -> None:
    overlap = box_overlap(a, b)
    assert 0 <= overlap <= 1 + 1e-9
    assert overlap == pytest.approx(box_overlap(b, a))
    assert box_overlap(a, a) == pytest.approx(1)
    assert centre_inside(a, a)
    if overlap > 0.75 + 1e-9:  # then the centres are nearer than half a side
        assert centre_inside(a, b)


@given(boxes())
def test_a_box_is_read_as_it_was_written(box: Box) -> None:
    assert read_box(f"there: [{', '.join(map(str, box))}]") == box


@given(st.integers(0, 400), st.integers(0, 400))
def test_an_interval_holds_the_share_and_narrows(a: int, b: int) -> None:
    right, n = min(a, b), max(a, b)
    assume(n > 0)
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high
    more = wilson_interval(4 * right, 4 * n)
    assert more[1] - more[0] < high - low
    mirrored = wilson_interval(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_intervals_of_known_shares() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


texts = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1).filter(str.strip)


@given(
    st.one_of(
        st.builds(Exact, st.lists(texts, min_size=1, max_size=3).map(tuple)),
        st.builds(Number, st.floats(-1e15, 1e15), st.floats(0, 10)),
        st.builds(BoxHit, boxes()),
    )
)
def test_a_right_answer_is_judged_right(expected: Exact | Number | BoxHit) -> None:
    answers = list(expected.right_answers())
    assert len(set(answers)) == len(answers)
    assert all(expected.judge(answer).right for answer in answers)
    if isinstance(expected, Exact | Number):
        assert answers


@given(st.lists(texts, min_size=1, max_size=3).map(tuple), st.sampled_from(["", " {} ", "so: {}!", "({})"]))
def test_what_stands_apart_is_contained(accepted: tuple[str, ...], around: str) -> None:
    expected = Contains(accepted)
    for answer in expected.right_answers():
        assert expected.judge((around or "{}").replace("{}", answer)).right


@given(st.floats(-1e12, 1e12), st.sampled_from(["", "about ", "= ", "Step 2: "]))
def test_the_last_number_is_read(value: float, before: str) -> None:
    found = last_number(f"{before}{value:,.4f} in all")
    assert found is not None
    assert math.isclose(found, value, abs_tol=1e-4)
