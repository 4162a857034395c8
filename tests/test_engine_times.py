"""The engine that commands take of themselves: what was measured on this machine, model and number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phisight import engine_times
from phisight.cli.cache import own_cache
from phisight.cli.engine_choice import keep_measured
from phisight.cli.main import main
from phisight.engine_times import EngineTimes, MeasuredEngines
from phisight.loading import model_directory
from phisight.manifest import Manifest
from phisight.planner import Verdict

DEMO = model_directory("demo")
RUN = ["run", "demo", "What is 17 + 25?", "--mode", "nothink", "--temperature", "0", "--threads", "1", "--json"]
OPENING = (0.5, 0.5)
"""Seconds."""
UNMEASURED = "--against openvino was not run"


def report(prefill: tuple[float, float], decode: tuple[float, float]) -> dict[str, dict[str, float]]:
    """(ONNX Runtime's, OpenVINO's) seconds of 512 positions, and of a step."""
    stages = {"prefill": prefill, "decode": decode}
    return {name: {"ours_s": ours, "other_s": other} for name, (ours, other) in stages.items()}


def device_note(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([*RUN, *arguments]) == 0
    notes: list[str] = json.loads(capsys.readouterr().out)["notes"]
    return next(note for note in notes if note.startswith("device "))


ROOM, NO_ROOM = Verdict(True, "needs 2.0 of 4.0 GB"), Verdict(False, "needs 8.0 of 4.0 GB")


def test_the_question_decides() -> None:
    """1024 positions and 256 steps: a faster prefill may be worth a slower step, but not any."""
    ours = EngineTimes(prefill=0.010, decode=0.040, opening=3)
    assert ours.seconds(once=False) == pytest.approx(10.24 + 10.24)
    assert ours.seconds(once=True) == pytest.approx(10.24 + 10.24 + 3)
    twice = MeasuredEngines(ours, EngineTimes(0.005, 0.044, 5)).choice(NO_ROOM)
    assert (twice.name, twice.device) == ("openvino:CPU", "cpu")
    assert "prefills 2.00 and decodes 0.91 times as fast as ONNX Runtime here" in twice.reason
    assert "1024 positions and 256 steps take 16.4 s with it, 20.5 s without, and 15.4 s with it for" in twice.reason
    assert "(needs 8.0 of 4.0 GB)" in twice.reason
    assert MeasuredEngines(ours, EngineTimes(0.005, 0.080, 5)).choice(NO_ROOM).name == "cpu"
    assert MeasuredEngines(ours, EngineTimes(0.0098, 0.0392, 5)).choice(ROOM).name == "cpu"  # 2 % are no difference


def test_both_where_that_pays_and_fits() -> None:
    ours = EngineTimes(prefill=0.010, decode=0.040, opening=3)
    measured = MeasuredEngines(ours, EngineTimes(0.005, 0.080, 2))
    both = measured.choice(ROOM)
    assert (both.name, both.device, both.openvino, both.paired) == ("openvino+cpu", "cpu", "CPU", True)
    assert measured.choice(NO_ROOM).name == "cpu"
    assert measured.choice(ROOM, once=True).name == "openvino+cpu"  # 20.4 s for 23.5 s
    slow_to_open = MeasuredEngines(ours, EngineTimes(0.005, 0.080, 8))
    assert slow_to_open.choice(ROOM, once=True).name == "cpu"
    assert slow_to_open.choice(ROOM).name == "openvino+cpu"
    # Where OpenVINO's steps are no slower, the second copy of the weights buys nothing.
    assert MeasuredEngines(ours, EngineTimes(0.005, 0.041, 2)).choice(ROOM).name == "openvino:CPU"


@pytest.mark.skipif(
    engine_times.find_spec("openvino") is None, reason='OpenVINO is not installed: pip install "phisight[openvino]"'
)
def test_auto_takes_what_was_faster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(DEMO)
    assert UNMEASURED in device_note([], capsys)
    choice = keep_measured(DEMO, manifest, 1, report((2.0, 1.0), (0.05, 0.05)), OPENING)
    assert choice is not None
    rates = choice.reason.partition(";")[0]
    assert device_note([], capsys).startswith(f"device openvino:CPU: {rates}; opening the model, 1024 positions")
    assert device_note(["--device", "cpu"], capsys) == "device cpu: as asked for"
    for other in (["--no-cache"], ["--threads", "2"], ["--accuracy-level", "4"]):
        assert UNMEASURED in device_note(other, capsys)
    keep_measured(DEMO, manifest, 1, report((1.0, 2.0), (0.05, 0.05)), OPENING)  # measured again, the other way round
    assert device_note([], capsys).startswith("device cpu: OpenVINO prefills 0.50 and decodes 1.00 times as fast")
    monkeypatch.setattr(engine_times, "find_spec", lambda name: None)  # as if it had been uninstalled since
    assert UNMEASURED in device_note([], capsys)
    assert len(own_cache().entries()) == 1


@pytest.mark.parametrize(
    "stages",
    [
        {},
        report((2.0, 1.0), (0.05, 0.05)) | {"decode": {"ours_s": 0.05, "other_s": None}},
        {"prefill": report((2.0, 1.0), (0.05, 0.05))["prefill"]},
    ],
)
def test_half_a_measurement_is_not_kept(stages: dict[str, Any], tmp_path: Path) -> None:
    assert keep_measured(DEMO, Manifest.read(DEMO), 1, stages, OPENING) is None
    assert own_cache().entries() == []
