"""Speed and memory of a model in a process of its own."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phisight.cli.main import main
from phisight.compare.memory import peak_memory
from phisight.compare.passages import Asking, Passage, Question, Window, drawn_sources
from phisight.compare.speed import MOST_PASSAGES, RATES, chosen, measure_speed
from phisight.compare.subjects import Opening, Source, Subject, subjects_of
from phisight.compare.workspace import Workspace
from phisight.errors import EngineError, PhisightError
from phisight.loading import model_directory

MIB = 1 << 20


@pytest.fixture(scope="module")
def demo() -> Subject:
    return subjects_of(Source("demo", model_directory("demo")), Opening(threads=1), both_levels=False)[0]


def questions(count: int) -> list[Passage]:
    return [Question.of(source) for source in drawn_sources(count)[::count]]  # one of each task


def test_questions_are_timed_stage_by_stage(demo: Subject) -> None:
    done: list[int] = []
    found = measure_speed(demo, questions(1)[:4], Asking(8), done.append)
    assert sum(done) == 4
    assert found["load_seconds"] > 0
    assert found["peak_bytes"] is None or 20 * MIB < found["peak_bytes"] < 4096 * MIB
    assert list(found) == ["load_seconds", "peak_bytes", *RATES]
    for name in ("prepare", "encode", "prefill", "decode"):
        rate = found[f"{name}_tokens_per_second"]
        assert 0 < rate["p25"] <= rate["median"] <= rate["p75"]
        assert rate["n"] == 3  # the first one warms up
    assert found["score_tokens_per_second"] is None


def test_windows_are_scored(demo: Subject) -> None:
    found = measure_speed(demo, [Window(tuple(range(1, 513)), 0)], Asking(8), lambda done: None)
    assert found["score_tokens_per_second"]["n"] == 1
    assert found["decode_tokens_per_second"] is None


def test_memory_is_that_of_the_other_process(demo: Subject) -> None:
    if peak_memory() is None:
        pytest.skip("this system does not tell")
    ballast = np.ones(600 * MIB, np.uint8)
    assert peak_memory() > 600 * MIB  # type: ignore[operator]
    found = measure_speed(demo, questions(1)[4:5], Asking(2), lambda done: None)
    assert found["peak_bytes"] < 600 * MIB
    del ballast


class _Ends(Subject):
    def open(self) -> Any:
        os._exit(3)


class _Fails(Subject):
    def open(self) -> Any:
        raise EngineError("it has no engine")


@pytest.mark.parametrize(
    ("kind", "said"), [(_Ends, "the process of demo ended with status 3"), (_Fails, "it has no engine")]
)
def test_what_happens_to_the_process_is_told(demo: Subject, kind: type[Subject], said: str) -> None:
    fields = {name: getattr(demo, name) for name in Subject.__dataclass_fields__}
    with pytest.raises(EngineError, match=said):
        measure_speed(kind(**fields), questions(1)[:1], Asking(2), lambda done: None)


def test_passages_are_taken_from_all_over() -> None:
    passages: list[Passage] = [Window((), number) for number in range(1000)]
    numbers = [passage.number for passage in chosen(passages) if isinstance(passage, Window)]
    assert len(numbers) == MOST_PASSAGES
    assert numbers[0] == 0
    assert numbers[-1] >= 900
    assert len({b - a for a, b in pairwise(numbers)}) <= 2
    assert len(chosen(passages[:3])) == 3


def test_speed_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short line about nothing. " * 120, encoding="utf-8")
    arguments = ["compare", "demo", "demo", "--out", str(tmp_path / "out"), "--data", str(text), "--n", "1"]
    measured: list[str] = []

    def measure(subject: Subject, *rest: Any) -> dict[str, Any]:
        measured.append(subject.name)
        return {"load_seconds": 1.0, "peak_bytes": 5_000_000, **dict.fromkeys(RATES)}

    monkeypatch.setattr("phisight.compare.run.measure_speed", measure)
    for _ in range(2):
        assert main([*arguments, "--speed", "--threads", "1"]) == 0
    assert measured == ["demo", "demo (accuracy_level 0)"]  # the variant is the reference's own file
    assert "5 MB" in capsys.readouterr().out


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work = Workspace(tmp_path / "work")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(PhisightError, match=r"work cannot be written \(No space left on device\): free some space"):
        work.write("reference", "key", {"a": 1}, {"logits": np.zeros((1, 2), np.float32)})
    assert work.read("reference", "key") is None
    assert not list((tmp_path / "work/reference").iterdir())
    monkeypatch.undo()
    work.write("reference", "key", {"a": 1}, {"logits": np.zeros((1, 2), np.float32)})
    assert work.read("reference", "key") is not None
