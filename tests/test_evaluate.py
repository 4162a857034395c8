"""Evaluating the built-in model: reports, pictures made grey, failures, and what can be had without looking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import phisight
from phisight.answer import Answer, Stats
from phisight.errors import EngineError, InputError
from phisight.evaluate import Case, DrawnCases, EvaluationSettings, FailureFolder, Result, TaskReport, evaluate
from phisight.evaluate.report import most_frequent_answer, shape_of
from phisight.evaluate.scoring import BoxHit, Contains, Exact, Expected, Number
from phisight.model import Model
from phisight.tasks import TASKS, sample

PRICE = Path(phisight.__file__).parent / "demo/pictures/price.png"


@pytest.fixture(scope="module")
def model() -> Model:
    return phisight.load("demo", threads=1)


@pytest.fixture(scope="module")
def settings(model: Model) -> EvaluationSettings:
    return EvaluationSettings(model.options(temperature=0, max_tokens=96))


def price(expected: Expected, **fields: object) -> Case:
    case: dict[str, object] = {"task": "prices", "kind": None, "origin": "line", "number": 1, "pictures": (PRICE,)}
    return Case(question="What does the text say?", expected=expected, **(case | fields))  # type: ignore[arg-type]


def answered(text: str, expected: Expected, *, kind: str = "k", size: tuple[int, int] = (32, 32)) -> Result:
    """A result as if a model had answered."""
    stats = Stats(0, 0, 0, 0, 1, 0, 4, 9, 0, 13, 2, 5, 4, None)
    case = Case("task", kind, "seed", 0, "?", (), expected)
    return Result(case, size, Answer(text, "so", "length" if text == "cut" else "stop", stats), None, 0.5)


def test_a_report_of_hand_made_results() -> None:
    failed = Result(Case("task", "b", "line", 9, "?", (), Exact(("x",)), id="nine"), None, None, "no picture", 0.25)
    results = [
        answered("x", Exact(("x",)), kind="b", size=(10, 30)),
        answered(" x\n", Exact(("x",)), kind="a", size=(30, 10)),
        answered("cut", Exact(("y",)), kind="a", size=(30, 30)),
        failed,
    ]
    found = TaskReport.of(results, planned=10).as_json()
    assert (found["n"], found["right"], found["exact_match"], found["planned"]) == (4, 2, 0.5, 10)
    assert found["interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)
    assert (found["most_frequent_answer"], found["constant_answer"]) == ("x", 0.75)
    assert {kind: (each["n"], each["exact_match"]) for kind, each in found["kinds"].items()} == {
        "a": (2, 0.5),
        "b": (2, 0.5),
    }
    assert list(found["aspect_ratios"]) == ["tall", "square", "panorama"]  # the failure has no picture
    assert found["errors"] == [{"line": 9, "id": "nine", "error": "no picture"}]
    assert (found["cut"], found["thoughts"]) == (1, 3)
    assert (found["generated_tokens"], found["thought_tokens"], found["image_tokens"]) == (15, 6, 12)
    assert found["seconds"] == 1.75
    assert "mean_iou" not in found


def test_a_report_of_boxes_and_of_several_metrics() -> None:
    box = BoxHit((0.2, 0.2, 0.6, 0.4))
    results = [answered("[0.2, 0.2, 0.6, 0.4]", box), answered("[0.2, 0.2, 0.4, 0.4]", box), answered("nothing", box)]
    found = TaskReport.of(results, 3).as_json()
    assert (found["box_hit"], found["mean_iou"]) == (pytest.approx(2 / 3), pytest.approx(0.5))
    assert "exact_match" not in found
    mixed = TaskReport.of([*results, answered("5", Number(5)), answered("no", Contains(("yes",)))], 5).as_json()
    assert (mixed["box_hit"], mixed["number_match"], mixed["contains_match"]) == (pytest.approx(2 / 3), 1.0, 0.0)
    assert (mixed["n"], mixed["right"], mixed["mean_iou"]) == (5, 3, pytest.approx(0.5))
    nothing = TaskReport.of([], 5).as_json()
    assert (nothing["n"], nothing["interval"], nothing["constant_answer"]) == (0, [0.0, 1.0], 0.0)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((49, 100), "tall"),
        ((50, 100), "upright"),
        ((79, 100), "upright"),
        ((80, 100), "square"),
        ((100, 100), "square"),
        ((100, 80), "square"),
        ((100, 79), "wide"),
        ((100, 50), "wide"),
        ((100, 49), "panorama"),
    ],
)
def test_shapes(size: tuple[int, int], shape: str) -> None:
    assert shape_of(size) == shape


def test_the_most_frequent_answer() -> None:
    texts: list[Expected] = [Exact(("a", "b")), Exact(("b", "b ")), Exact(("c",)), Number(3), Exact(("3",))]
    found = most_frequent_answer(texts)
    assert (found.answer, found.share) == ("b", 0.4)
    boxes = [BoxHit((0, 0, 0.3, 0.3)), BoxHit((0.2, 0.2, 0.5, 0.5)), BoxHit((0.6, 0.6, 1, 1))]
    found = most_frequent_answer(boxes)
    assert found.share == pytest.approx(2 / 3)
    assert [box.judge(found.answer).right for box in boxes] == [True, True, False]


@pytest.mark.parametrize("task", TASKS)
def test_no_constant_answer_is_right_often(task: str) -> None:
    drawn = [sample(task, seed).question for seed in range(2000)]
    expected: dict[str, list[Expected]] = {}
    for question in drawn:
        wanted = Exact((question.answer,)) if question.box is None else BoxHit(question.box)
        expected.setdefault(question.kind, []).append(wanted)
    assert most_frequent_answer([each for kind in expected.values() for each in kind]).share < 0.25
    for kind, each in expected.items():  # of two answers, one is right half the time
        of_two = task == "two_images" and kind in ("number", "more", "same")
        assert most_frequent_answer(each).share < (0.56 if of_two else 0.3), kind


def test_drawn_cases_come_from_their_seeds() -> None:
    cases = DrawnCases("read", range(3, 6))
    assert len(cases) == 3
    assert [case.number for case in cases] == [3, 4, 5]
    assert [case.question for case in cases] == [case.question for case in cases]
    for case in cases:
        drawn = sample("read", case.number)
        assert case.expected == Exact((drawn.question.answer,))
        assert np.array_equal(np.asarray(case.pictures[0]), drawn.pictures[0])


def test_a_picture_is_seen_unless_it_is_blank(model: Model, settings: EvaluationSettings) -> None:
    cases = [price(Exact(("$6.75",))), price(Contains(("6.75",)), mode="think", number=2)]
    (direct, (picture,)), (thought, _) = evaluate(model, cases, settings)
    assert direct.verdict.right
    assert direct.case.pictures == ()
    assert direct.size == picture.size == Image.open(PRICE).size
    assert thought.answer is not None
    assert thought.answer.thought
    blank = EvaluationSettings(settings.options, blank=True)
    ((unseen, (grey,)),) = evaluate(model, cases[:1], blank)
    assert not unseen.verdict.right
    assert (grey.size, grey.getcolors()) == (picture.size, [(picture.width * picture.height, (128, 128, 128))])


def test_arithmetic_needs_no_picture_and_the_rest_does(model: Model, settings: EvaluationSettings) -> None:
    blank = EvaluationSettings(settings.options, blank=True)
    seeing = [result.text for result, _ in evaluate(model, DrawnCases("arithmetic", range(10)), settings)]
    assert [result.text for result, _ in evaluate(model, DrawnCases("arithmetic", range(10)), blank)] == seeing
    for task, chance in (("read", 0.25), ("ground", 0.5)):
        results = [result for result, _ in evaluate(model, DrawnCases(task, range(20)), blank)]
        assert TaskReport.of(results, 20).score.share <= chance


def test_a_case_that_fails_is_a_result(
    model: Model, settings: EvaluationSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(PRICE.read_bytes()[:300])
    cases = [
        price(BoxHit((0, 0, 1, 1)), pictures=(damaged,)),
        price(Exact(("$6.75",)), number=2),
        price(Exact(("x",)), pictures=(PRICE,) * 40, number=3),  # more than the context holds
    ]
    results = [result for result, _ in evaluate(model, cases, settings)]
    assert "damaged.png is damaged" in str(results[0].error)
    assert (results[0].verdict.right, results[0].verdict.overlap, results[0].size) == (False, 0.0, None)
    assert results[1].verdict.right
    assert "the context holds" in str(results[2].error)
    assert [len(TaskReport.of(results, 3).errors), TaskReport.of(results, 3).score.right] == [2, 1]

    def failing(kind: Exception) -> Callable[..., Answer]:
        def fail(*arguments: object, **named: object) -> Answer:
            raise kind

        return fail

    for kind, said in {EngineError("out\nof memory"): "out of memory", MemoryError(): "MemoryError"}.items():
        monkeypatch.setattr(model, "generate", failing(kind))
        ((result, _),) = evaluate(model, cases[1:2], settings)
        assert result.error == said
    monkeypatch.setattr(model, "generate", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not counted
        list(evaluate(model, cases[1:2], settings))


def test_failures_are_kept_with_their_pictures(model: Model, settings: EvaluationSettings, tmp_path: Path) -> None:
    folder = FailureFolder(tmp_path / "wrong")
    folder.make()
    cases = [price(Exact(("a", "b")), task="a/b: ü", id="x", pictures=(PRICE, PRICE)), price(Number(1), number=2)]
    for result, pictures in evaluate(model, cases, settings):
        folder.add(result, pictures)
    rows = [json.loads(line) for line in (folder.folder / "failures.jsonl").read_text("ascii").splitlines()]
    assert [(row["task"], row["line"], row["id"], row["expected"], row["metric"]) for row in rows] == [
        ("a/b: ü", 1, "x", ["a", "b"], "exact"),
        ("prices", 2, None, 1, "number"),
    ]
    assert [row["pictures"] for row in rows] == [["a_b_-line1-1.png", "a_b_-line1-2.png"], ["prices-line2.png"]]
    assert rows[1]["answer"] == "$6.75"
    names = {name for row in rows for name in row["pictures"]}
    assert {path.name for path in folder.folder.iterdir()} == names | {"failures.jsonl"}
    seen = Image.open(folder.folder / "prices-line2.png")
    assert np.array_equal(np.asarray(seen), np.asarray(phisight.open_image(PRICE)))


def test_a_place_for_failures_must_be_free(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    FailureFolder(tmp_path / "empty").make()
    with pytest.raises(InputError, match="empty is not empty"):
        FailureFolder(tmp_path / "empty")
    with pytest.raises(InputError, match="is a file"):
        FailureFolder(tmp_path / "empty/failures.jsonl")
    with pytest.raises(InputError, match="is no directory"):
        FailureFolder(tmp_path / "none/wrong")
