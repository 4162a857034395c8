"""What the built-in model can do, and that it does it by looking: losses of any kind show in its answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import phisight
from phisight.evaluate import DrawnCases, EvaluationSettings, Result, TaskReport, evaluate
from phisight.tasks import sample
from phisight.tasks.question import Question

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
SEEDS = range(20_000, 20_060)
LEAST = {"read": 0.85, "chart": 0.93, "ground": 0.95, "count": 0.85, "arithmetic": 0.95, "two_images": 0.88}
"""Of 60 questions a task: below the shipped model's shares on 500 by as much as chance may make of them."""
Exporter = Callable[..., Path]


def results(model: phisight.Model, task: str, seeds: range = SEEDS, *, blank: bool = False) -> list[Result]:
    settings = EvaluationSettings(model.options(temperature=0, max_tokens=96), blank=blank)
    return [result for result, _ in evaluate(model, DrawnCases(task, seeds), settings)]


def share(model: phisight.Model, task: str, seeds: range = SEEDS, *, blank: bool = False) -> float:
    return TaskReport.of(results(model, task, seeds, blank=blank), len(seeds)).score.share


@pytest.fixture(scope="module")
def exact(exported: Exporter) -> phisight.Model:
    return phisight.load(exported(DEMO, decoder="f32"), threads=2)


@pytest.fixture(scope="module")
def shipped() -> phisight.Model:
    return phisight.load("demo", threads=2)


@pytest.mark.parametrize("task", LEAST)
def test_it_can_do_its_tasks(exact: phisight.Model, task: str) -> None:
    assert share(exact, task) >= LEAST[task]


@pytest.mark.parametrize("task", LEAST)
def test_the_shipped_int8_loses_little(exact: phisight.Model, shipped: phisight.Model, task: str) -> None:
    assert share(shipped, task) >= share(exact, task) - 0.05


@pytest.mark.parametrize("task", ["read", "ground", "count"])
def test_without_its_picture_it_is_left_to_chance(shipped: phisight.Model, task: str) -> None:
    assert share(shipped, task, blank=True) < 0.25


def test_the_position_table_is_resized_as_in_training(exported: Exporter, tmp_path: Path) -> None:
    """A table that is transposed, as by swapping rows and columns, costs most answers about places."""

    directory = tmp_path / "transposed"
    shutil.copytree(exported(DEMO, decoder="f32"), directory, copy_function=shutil.copyfile)
    _transpose_positions(directory)
    assert share(phisight.load(directory, threads=2), "ground") < LEAST["ground"] / 2


def _transpose_positions(directory: Path) -> None:
    graph = onnx.load(directory / "vision.onnx", load_external_data=False)
    (table,) = [each for each in graph.graph.initializer if each.name.endswith("position_embedding.weight")]
    place = {entry.key: entry.value for entry in table.external_data}
    data = np.memmap(directory / "vision.onnx.data", np.float32, "r+", int(place["offset"]), tuple(table.dims))
    square = data.reshape(16, 16, -1)
    square[:] = square.transpose(1, 0, 2).copy()
    data.flush()


def test_a_photo_that_was_turned_is_turned_back(shipped: phisight.Model, tmp_path: Path) -> None:
    """As phones save them: pixels on their side, and an EXIF entry that says so."""
    right = {"told": 0, "ignored": 0}
    for seed in SEEDS:
        drawn = sample("read", seed)
        turned = Image.fromarray(drawn.pictures[0]).transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        turned.save(tmp_path / "told.png", exif=exif)
        turned.save(tmp_path / "ignored.png")
        for name in right:
            right[name] += answer(shipped, drawn.question, tmp_path / f"{name}.png") == drawn.question.answer
    assert right["told"] >= LEAST["read"] * len(SEEDS)
    assert right["ignored"] < 0.1 * len(SEEDS)


def answer(model: phisight.Model, question: Question, picture: Path) -> str:
    options = model.options(temperature=0, max_tokens=96)
    return model.generate(question.text, [picture], options=options).text.strip()


@pytest.mark.parametrize("task", ["chart", "arithmetic", "count"])
def test_think_and_nothink_do_what_they_say(shipped: phisight.Model, task: str) -> None:
    options = shipped.options(temperature=0, max_tokens=96)
    for seed in SEEDS[:10]:
        drawn = sample(task, seed)
        thinking = shipped.generate(drawn.question.text, drawn.pictures, mode="think", options=options)
        direct = shipped.generate(drawn.question.text, drawn.pictures, mode="nothink", options=options)
        assert thinking.thought.strip()
        assert thinking.text.strip()
        assert not direct.thought
        assert direct.text.strip()
        assert direct.stats.generated_tokens < thinking.stats.generated_tokens


def test_a_thinking_budget_cuts_cleanly(shipped: phisight.Model) -> None:
    """The thought stops at the budget, and an answer of the right kind follows all the same."""
    options = shipped.options(temperature=0, max_tokens=96, thinking_budget=3)
    for seed in SEEDS[:20]:
        drawn = sample("arithmetic", seed)
        said = shipped.generate(drawn.question.text, mode="think", options=options)
        assert said.stats.thought_tokens <= 3
        assert said.text.strip().isdigit()
        assert said.finish_reason == "stop"
