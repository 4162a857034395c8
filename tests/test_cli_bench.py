"""`phisight bench`: stages timed beside llama.cpp on the same weights, and what follows from two depths."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import phisight
from phisight.bench import STAGES, Bounds, Contender, Samples
from phisight.bench.report import as_report, full_depth
from phisight.cli.main import main
from phisight.devices import DeviceChoice, EngineDevices
from phisight.export.shallow import write_shallow
from phisight.export.transcription import shallow_config, transcribe
from phisight.loading import model_directory
from phisight.manifest import Manifest
from phisight.naflex import Patches

IDS = np.arange(1, 33, dtype=np.int32)


def test_every_stage_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    left = set(Path(tempfile.gettempdir()).glob("phisight-bench-*"))
    stages = "encode_256,prefill,decode,second_question,load"
    assert main(["bench", "demo", "--against", "llama.cpp", "--stages", stages, "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["stages"]) == ["encode_256", "prefill", "decode", "load", "second_question"]
    for name in ("encode_256", "prefill", "decode"):
        row = report["stages"][name]
        assert row["other_s"] == min(row["others"].values()) > 0
        assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"])
        assert row["ratio_default"] >= row["ratio"]
        assert row["extrapolated"] is None  # the widths are not the 15B model's
        assert row["share"] > 0
    assert {each["engine"] for each in report["contenders"]} == {"onnxruntime", "llama.cpp"}
    assert set(report["memory"]) == {each["name"] for each in report["contenders"]}
    assert report["bounds"]["read_bytes_per_second"] > 0
    assert set(Path(tempfile.gettempdir()).glob("phisight-bench-*")) <= left


def test_a_k_quant_of_the_checkpoint_is_told_apart(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> None:
    command = ["bench", "demo", "--stages", "encode_256,decode", "--runs", "1", "--checkpoint"]
    assert main([*command, "demo", "--against", "llama.cpp", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = report["stages"]["decode"]
    assert row["other_weights"]["llama.cpp Q4_K_M"] > 0
    assert "llama.cpp Q4_K_M" not in row["others"]
    assert "other_weights" not in report["stages"]["encode_256"]
    assert main([*command, "demo"]) == 2
    assert "goes with --against llama.cpp" in capsys.readouterr().err
    assert main([*command, str(tiny_checkpoint), "--against", "llama.cpp"]) == 2
    assert "has another configuration" in capsys.readouterr().err


def test_the_transcription_holds_the_same_numbers(tmp_path: Path) -> None:
    directory = model_directory("demo")
    transcribe(directory, tmp_path)
    ours = phisight.load(directory, accuracy_level=0, threads=1)
    theirs = phisight.load(tmp_path / "model.gguf", mmproj=tmp_path / "mmproj.gguf", threads=1)
    a, b = ours.score(IDS, ()), theirs.score(IDS, ())
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()  # llama.cpp rounds activations to INT8
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.8


def test_the_first_layers_alone_are_a_model(tmp_path: Path) -> None:
    directory = model_directory("demo")
    onnx, gguf = tmp_path / "onnx", tmp_path / "gguf"
    onnx.mkdir()
    gguf.mkdir()
    write_shallow(directory, onnx, 2)
    transcribe(directory, gguf, layers=2)
    config = shallow_config(Manifest.read(directory).model, 2)
    assert (config.decoder.num_layers, config.vision and config.vision.used_layers) == (2, 2)
    ours = Contender("ours", "onnxruntime", onnx, config, 1).open()
    theirs = Contender("theirs", "llama.cpp", gguf, config, 1).open()
    a, b = ours.decoder.append([IDS]), theirs.decoder.append([IDS])
    assert np.corrcoef(a[0], b[0])[0, 1] > 0.99
    whole = Contender("whole", "onnxruntime", directory, Manifest.read(directory).model, 1).open()
    assert np.corrcoef(a[0], whole.decoder.append([IDS])[0])[0, 1] < 0.99
    patches = Patches(np.random.default_rng(0).uniform(-1, 1, (64, 768)).astype(np.float32), (8, 8), (128, 128))
    assert ours.encoder is not None and theirs.encoder is not None
    a, b = ours.encoder.encode(patches), theirs.encoder.encode(patches)
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)


def test_two_depths_tell_a_third() -> None:
    assert full_depth((7.0, 5.0), (2, 1, 40)) == 3 + 40 * 2


def test_times_that_a_busy_machine_turned_round_are_not_extrapolated() -> None:
    directory = model_directory("demo")
    ours = Contender("ours", "onnxruntime", directory, Manifest.read(directory).model, 1)
    deep, depths = Samples({"prefill": {"ours": [2.0]}}), {"decoder": (2, 1, 40)}
    found = {}
    for seconds in (1.5, 2.5):
        shallow = Samples({"prefill": {"ours": [seconds]}})
        report = as_report(STAGES, [ours], deep, shallow, depths, Bounds(1, 1e9, 1e9), 1)
        found[seconds] = report["stages"]["prefill"]["extrapolated"]
    assert found[1.5]["ours_s"] == pytest.approx(21)
    assert found[2.5] is None


def test_work_grows_with_the_stage() -> None:
    config = Manifest.read(model_directory("demo")).model
    work = {stage.name: stage.operations(config) for stage in STAGES}
    assert work["encode_256"] * 4 < work["encode_1024"]  # attention grows with the square
    assert work["decode"] < work["prefill"] < 512 * work["decode"] * 2
    assert work["load"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--stages", "encode_9"], "encode_9"),
        (["demo", "--runs", "0"], "--runs is 0"),
        (["demo", "--threads", "some"], "--threads is 'some'"),
        (["demo", "--device", "cuda"], "device cuda needs onnxruntime-gpu"),
        (["demo", "--n", "5"], "--n goes with --budget-curve"),
        (["demo", "--budget-curve", "--patches", "1,2,x"], "--patches is '1,2,x'"),
        (["demo", "--budget-curve", "--patches", "9999"], "--patches is 9999"),
        (["demo", "--budget-curve", "--n", "0"], "--n is 0"),
        (["demo", "--budget-curve", "--out", "nowhere/a.svg"], "is no directory"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("other", "said"), [("openvino", "--device cpu, not webgpu"), ("llama.cpp", "on a GPU, too")])
def test_what_has_no_gpu_is_not_compared_with_one(
    other: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phisight.cli.bench.choose_device", lambda *_: DeviceChoice("webgpu", "as asked for"))
    monkeypatch.setattr(
        "phisight.cli.bench.llamacpp_devices", lambda: EngineDevices("llama.cpp", ("cpu",), "no gpu: so compiled")
    )
    assert main(["bench", "demo", "--device", "webgpu", "--against", other]) == 2
    assert said in capsys.readouterr().err


def test_a_budget_curve_shows_what_tokens_buy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "curve.svg"
    options = ["--budget-curve", "--tasks", "chart", "--n", "8", "--patches", "24,144", "--out", str(drawing)]
    assert main(["bench", "demo", *options, "--json"]) == 0
    few, many = json.loads(capsys.readouterr().out)["rows"]
    assert (few["max_patches"], many["max_patches"]) == (24, 144)
    assert few["image_tokens"] <= 24 < many["image_tokens"]
    assert few["right"] < many["right"]
    assert few["n"] == many["n"] == 8 and few["interval"][0] <= few["right"] <= few["interval"][1]
    text = drawing.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert text.count("<circle") == 2 and ">chart</text>" in text


def test_a_budget_curve_of_own_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(model_directory("demo").parent / "pictures/price.png", tmp_path / "a.png")
    case = {"image": "a.png", "question": "What does the text say?", "expected": "$6.75", "task": "prices"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case) + "\n")
    assert main(["bench", "demo", "--budget-curve", "--tasks", str(tmp_path), "--patches", "144"]) == 0
    assert "prices" in capsys.readouterr().out
