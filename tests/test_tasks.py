"""The drawn tasks: pictures of the promised sizes, and questions whose answers follow from what was drawn."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phisight.naflex import target_size
from phisight.tasks import SCENES, TASKS, Scene, draw, evaluation_rng, grids_of, sample
from phisight.tasks.arithmetic import arithmetic_question
from phisight.tasks.canvas import COLOURS, Bar, Control, Figure, Text
from phisight.tasks.faces import FACES, glyph, size_of_capitals
from phisight.tasks.question import Question, box_overlap, centre_inside, read_box
from phisight.tasks.read import CODE_CHARACTERS, WORDS
from phisight.tasks.sizes import GRIDS, MAX_PATCHES, MIN_PATCHES, PATCH, draw_size

DRAWN = 100


def scenes(task: str) -> list[Scene]:
    rng = Random(f"test {task}")
    return [draw(task, rng, rng.choice(grids_of(task))) for _ in range(DRAWN)]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_names_a_sample(task: str) -> None:
    for seed in range(20):
        one, two = sample(task, seed), sample(task, seed)
        assert one.question == two.question
        assert all(np.array_equal(a, b) for a, b in zip(one.pictures, two.pictures, strict=True))
        assert len(one.pictures) == {"arithmetic": 0, "two_images": 2}.get(task, 1)
        assert all(picture.dtype == np.uint8 and picture.ndim == 3 for picture in one.pictures)
        assert one.question.task == task
    assert len({sample(task, seed).question for seed in range(50)}) > 35


def test_a_task_that_there_is_not() -> None:
    with pytest.raises(KeyError):
        sample("poetry", 0)


def test_grids_cover_the_range() -> None:
    counts = {rows * columns for rows, columns in GRIDS}
    assert (min(counts), max(counts)) == (24, 144)
    ratios = [columns / rows for rows, columns in GRIDS]
    assert min(ratios) == 0.25
    assert max(ratios) == 4
    assert len(GRIDS) > 100


@given(st.sampled_from(GRIDS), st.integers(0, 10**6))
def test_every_picture_becomes_its_grid(grid: tuple[int, int], seed: int) -> None:
    height, width = draw_size(Random(seed), grid)
    assert target_size(width, height, MAX_PATCHES, MIN_PATCHES) == (grid[1] * PATCH, grid[0] * PATCH)


def test_some_pictures_have_to_be_resized() -> None:
    odd = sum(any(side % PATCH for side in sample("read", seed).pictures[0].shape[:2]) for seed in range(200))
    assert 30 < odd < 90


def test_every_face_has_every_character() -> None:
    texts = CODE_CHARACTERS + "$." + "".join(WORDS)
    for face in FACES:
        drawn = {character: glyph(character, face, 20)[0].tobytes() for character in set(texts)}
        assert len(set(drawn.values())) == len(drawn), f"two characters of {face} look the same"


@pytest.mark.parametrize("height", [10, 13.5, 20])
def test_capitals_have_the_height_asked_for(height: float) -> None:
    for face in FACES:
        inked = glyph("H", face, size_of_capitals(height))[0][:, :, 0].max(1) > 0.5
        assert abs(int(inked.sum()) - height) <= 1


def test_read_asks_for_what_is_written() -> None:
    kinds = Counter()
    for scene in scenes("read"):
        (question,) = scene.questions
        (mark,) = scene.canvases[0].marks
        assert question.answer == (mark.text if isinstance(mark, Text) else mark.word)  # type: ignore[union-attr]
        if question.kind == "code":
            assert 3 <= len(question.answer) <= 6
            assert set(question.answer) <= set(CODE_CHARACTERS)
        kinds[question.kind] += 1
    assert set(kinds) == {"code", "word", "price"}


def test_text_stands_inside_its_picture_and_off_its_background() -> None:
    for scene in scenes("read"):
        canvas = scene.canvases[0]
        for mark in canvas.marks:
            boxes = mark.boxes if isinstance(mark, Text) else (mark.box,)
            for x0, y0, x1, y1 in boxes:
                assert x0 >= 0 and y0 >= -1 and x1 <= canvas.width and y1 <= canvas.height
                inside = canvas.pixels[max(0, int(y0)) : int(y1) + 1, int(x0) : int(x1) + 1].astype(int).sum(-1)
                assert inside.max() - inside.min() > 90


def test_chart_answers_follow_from_the_bars() -> None:
    kinds: Counter[str] = Counter()
    for scene in scenes("chart"):
        bars = {mark.colour: mark for mark in scene.canvases[0].marks if isinstance(mark, Bar)}
        values = {colour: bar.value for colour, bar in bars.items()}
        assert 2 <= len(values) <= 5
        units = {(bar.box[3] - bar.box[1] - 6) / bar.value for bar in bars.values() if bar.value}
        assert len(units) <= 1  # the heights are to scale
        for question in scene.questions:
            named = [colour for colour in COLOURS if f" {colour} " in question.text]
            named.sort(key=question.text.index)
            if question.kind == "extreme":
                high = any(word in question.text for word in ("tallest", "largest", "highest"))
                expected = (max if high else min)(values, key=values.__getitem__)
            else:
                numbers = [values[colour] for colour in named]
                answer = {"value": numbers[0], "sum": sum(numbers), "difference": max(numbers) - min(numbers)}
                expected = str(answer[question.kind])
            assert question.answer == expected
            kinds[question.kind] += 1
    assert set(kinds) == {"value", "extreme", "sum", "difference"}


def test_ground_asks_for_one_of_at_least_four_controls() -> None:
    for scene in scenes("ground"):
        canvas = scene.canvases[0]
        controls = [mark for mark in canvas.marks if isinstance(mark, Control)]
        assert len(controls) >= 4
        assert len({control.word for control in controls}) == len(controls)
        for index, question in enumerate(scene.questions):
            assert question.text.endswith("coordinates from 0.0000 to 1.0000.") == (index == 0)
            (control,) = [control for control in controls if f" {control.word}" in question.text.split(": ")[1]]
            x0, y0, x1, y1 = control.box
            truth = (x0 / canvas.width, y0 / canvas.height, x1 / canvas.width, y1 / canvas.height)
            assert question.box == truth
            said = read_box(question.answer)
            assert said is not None
            assert np.allclose(said, truth, atol=0.0051)
            assert min(truth) >= 0
            assert max(truth) <= 1
        for one in controls:
            for other in controls:
                assert one is other or box_overlap(one.box, other.box) < 0.05


def test_count_answers_follow_from_the_figures() -> None:
    counts: Counter[str] = Counter()
    for scene in scenes("count"):
        figures = [mark for mark in scene.canvases[0].marks if isinstance(mark, Figure)]
        for question in scene.questions:
            assert question.answer == str(_tally(question, figures))
        counts[scene.questions[0].answer] += 1
    assert set("0123456") <= set(counts)


def _tally(question: Question, figures: list[Figure]) -> int:
    shapes = [shape for shape in ("circle", "square", "triangle") if f"{shape}s" in question.text]
    colours = [colour for colour in COLOURS if f"{colour} " in question.text]
    return sum(
        figure.shape in (shapes or [figure.shape]) and figure.colour in (colours or [figure.colour])
        for figure in figures
    )


@given(st.integers(0, 10**6))
def test_arithmetic_is_right(seed: int) -> None:
    question = arithmetic_question(Random(seed))
    sum_ = next(word for word in question.text.rstrip(".?").split() if word[0].isdigit())
    assert int(question.answer) == eval(sum_)
    for step in question.thought.split():
        left, _, right = step.partition("=")
        assert eval(left) == int(right)


def test_two_images_answers_follow_from_both_pictures() -> None:
    kinds: Counter[str] = Counter()
    for scene in scenes("two_images"):
        first, second = (canvas.marks for canvas in scene.canvases)
        assert scene.canvases[0].pixels.shape == scene.canvases[1].pixels.shape
        for question in scene.questions:
            kinds[question.kind] += 1
            if question.kind == "number":
                numbers = [int(mark.text) for mark in (*first, *second) if isinstance(mark, Text)]
                wanted = (max if "larger" in question.text else min)(numbers)
                assert question.answer == ("first" if numbers[0] == wanted else "second")
                continue
            if question.kind == "same":
                shown = [[_content(mark) for mark in marks] for marks in (first, second)]
                assert question.answer == ("yes" if shown[0] == shown[1] else "no")
                continue
            figures = [[mark for mark in marks if isinstance(mark, Figure)] for marks in (first, second)]
            if question.kind == "change":
                changed = [b.colour for a, b in zip(*figures, strict=True) if a.colour != b.colour]
                assert [question.answer] == changed
                continue
            counts = [_tally(question, part) for part in figures]
            if question.kind == "total":
                assert question.answer == str(sum(counts))
            else:
                assert question.answer == ("first" if counts[0] > counts[1] else "second")
    assert set(kinds) == {"number", "more", "same", "total", "change"}


def _content(mark: object) -> object:
    return (mark.shape, mark.colour) if isinstance(mark, Figure) else mark.text  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", TASKS)
def test_no_single_answer_is_often_right(task: str) -> None:
    answers = Counter(sample(task, seed).question.answer for seed in range(600))
    assert answers.most_common(1)[0][1] < 0.25 * 600


@pytest.mark.parametrize("task", SCENES)
def test_questions_vary_in_words(task: str) -> None:
    openings = {" ".join(question.text.split()[:2]) for scene in scenes(task) for question in scene.questions}
    assert len(openings) >= (2 if task == "ground" else 3)


def test_evaluation_never_uses_a_training_generator() -> None:
    training = pytest.importorskip("phisight.training.batches", reason="PyTorch, the extra [train], is not installed")
    states = {evaluation_rng(task, seed).getstate() for task in TASKS for seed in range(200)}
    used = [
        training.training_rng(seed, stage, step, rank).getstate()
        for seed in range(3)
        for stage in ("tower", "answers", "decay")
        for step in range(60)
        for rank in range(2)
    ]
    assert len(states) == 200 * len(TASKS)
    assert states.isdisjoint(used)


def test_boxes_in_answers() -> None:
    assert read_box("It is at [0.10, 0.2,0.30, 1].") == (0.1, 0.2, 0.3, 1)
    assert read_box("[0.1, 0.2, 0.3]") is None
    assert read_box("[0.1.2, 0.2, 0.3, 0.4]") is None
    assert centre_inside((0, 0, 1, 1), (0.4, 0.4, 0.6, 0.6))
    assert not centre_inside((0, 0, 0.5, 1), (0.4, 0.4, 0.6, 0.6))
    assert box_overlap((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert box_overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert box_overlap((1, 1, 0, 0), (0, 0, 1, 1)) == 0
