"""Mixed precision by measurement: what is measured is what an engine finds, and plans keep to what was asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phisight
from phisight.backends.ort_session import SessionSettings
from phisight.cli.main import main
from phisight.compare.metrics import Divergence, Positions, positions_of
from phisight.errors import InputError
from phisight.export.calibration import trial
from phisight.export.calibration.held_out import HeldOut, hold_out
from phisight.export.calibration.run import Calibration, CalibrationOptions, Consumer, LayerInputs
from phisight.export.calibration.sensitivity import Sensitivity, SensitivityMeter
from phisight.export.calibration.sources import read_calibration
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import plan_export
from phisight.export.mixed import METHODS, Target, gguf_types, mixed_plan, onnx_types
from phisight.export.names import EMBEDDINGS, HEAD
from phisight.export.parallel import Progress
from phisight.export.plan import ExportOptions, Plan
from phisight.manifest import Manifest, bits_per_weight
from phisight.quant import ggml
from phisight.quant.stored_types import StoredType
from phisight.tokenizer import Tokenizer

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
TOKENS, HELD_OUT = 600, 500
QUICK = (
    *("--calibration-tokens", str(TOKENS), "--held-out-tokens", str(HELD_OUT), "--calibration-threads", "1"),
    *("--vision", "f32"),
)
QKV = "model.layers.1.self_attn.qkv_proj.weight"
TEXT = ("decoder", "head", "embeddings")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(DEMO)


@pytest.fixture(scope="module")
def held_out(checkpoint: Checkpoint) -> HeldOut:
    """What the command line holds out."""
    data = read_calibration("demo", DEMO, checkpoint.config, tokens=TOKENS + HELD_OUT)
    return hold_out(data, HELD_OUT, Tokenizer.from_file(DEMO / "tokenizer.json"))[1]


def _found(reference: phisight.Model, model: phisight.Model, held_out: HeldOut) -> float:
    """The mean divergence at the positions that count, by the runtime."""
    parts = []
    at = 0
    for sequence, (start, stop) in zip(held_out.data.sequences, held_out.spans, strict=True):
        right, found = (
            each.score(sequence.ids, sequence.images)[start - at : stop - at] for each in (reference, model)
        )
        parts.append(positions_of(right, found, right.argmax(axis=-1)))
        at += len(sequence)
    return Divergence.of(Positions.joined(parts)).kld_mean


def test_answers_are_what_counts(checkpoint: Checkpoint, held_out: HeldOut) -> None:
    tokenizer = Tokenizer.from_file(DEMO / "tokenizer.json")
    at = 0
    for sequence, (start, stop) in zip(held_out.data.sequences, held_out.spans, strict=True):
        # The next tokens of the positions that count, which lie behind all pictures.
        behind = len(sequence) - (start - at)
        said = tokenizer.decode(sequence.ids[len(sequence.ids) - behind + 1 :])
        before = tokenizer.decode(sequence.ids[: len(sequence.ids) - behind + 1][-1:])
        assert before == "<|im_sep|>"
        assert "<|im_sep|>" not in said
        assert stop - at == len(sequence) - 1
        at += len(sequence)
    text = read_calibration("text", DEMO, checkpoint.config, tokens=1100)
    rest, of_text = hold_out(text, 500, tokenizer)
    assert not of_text.questions
    assert of_text.positions + rest.positions == text.positions
    assert of_text.spans[0] == (len(of_text.data.sequences[0]) // 2, len(of_text.data.sequences[0]) - 1)


def test_sensitivities_are_what_the_engine_finds(
    checkpoint: Checkpoint, held_out: HeldOut, exported: Callable[..., Path], tmp_path: Path
) -> None:
    types = onnx_types(checkpoint, METHODS["rtn"], None, asymmetric=False)
    meter = SensitivityMeter(checkpoint, types, held_out, tmp_path / "m", SessionSettings(), lambda tokens: None)
    data = read_calibration("demo", DEMO, checkpoint.config, tokens=300)
    Calibration(checkpoint, data, tmp_path / "c", CalibrationOptions()).run(meter)
    assert meter.sensitivities.keys() == types.keys()
    reference = phisight.load(exported(DEMO, decoder="f32", vision="f32"), threads=1)
    for name in (EMBEDDINGS, QKV, HEAD):
        label = types[name][0].label
        one = exported(DEMO, decoder="f32", vision="f32", accuracy_level=0, overrides=((name, label),))
        found = _found(reference, phisight.load(one, threads=1), held_out)
        assert meter.sensitivities[name].kld == pytest.approx(found, rel=0.02, abs=1e-8)
    errors = meter.sensitivities[QKV].errors
    assert errors["int4 block 32"] == 1 < errors["int4 block 64"] < errors["int4 block 128"]
    assert errors["int8 block 32"] < 0.02


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_onnx_of_a_size(
    method: str,
    held_out: HeldOut,
    exported: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["export", "demo", str(out), "--method", method, "--accuracy-level", "0", *QUICK]
    assert main([*arguments, "--size", "4.9bpw", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.plan.json"]
    document = json.loads((tmp_path / "out.plan.json").read_text())
    assert report["measured"] == document
    assert 4.7 < document["bits_per_weight"] <= 4.9
    manifest = Manifest.read(out)
    manifest.verify(out)
    assert bits_per_weight(manifest.tensors, *TEXT) == document["bits_per_weight"]
    planned = {name: entry["type"] for name, entry in document["tensors"].items()}
    assert {name: manifest.tensors[name].scheme for name in planned} == planned
    assert len(set(planned.values())) > 1
    assert manifest.calibration is not None
    assert manifest.calibration["plan"]["kld"] == document["kld"]
    assert manifest.calibration["sha256"]
    reference = phisight.load(exported(DEMO, decoder="f32", vision="f32"), threads=1)
    found = _found(reference, phisight.load(out, threads=1), held_out)
    assert document["kld"]["measured"] == pytest.approx(found, rel=0.02)
    assert f"{QKV}  {planned[QKV]}" in captured.err

    # Fed back, the same types; and by hand another one.
    assert main([*arguments[:2], str(tmp_path / "again"), *QUICK[-2:], "--plan", str(tmp_path / "out.plan.json")]) == 0
    again = Manifest.read(tmp_path / "again")
    assert again.tensors == manifest.tensors
    assert again.options["overrides"] == len(planned)
    (tmp_path / "new.plan.json").touch()
    assert "exists: move it away" in _fails(capsys, "export", "demo", str(tmp_path / "new"), "--size", "5bpw")


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("phisight: error: ")
    return error


def test_gguf_within_a_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all matrices together bring more than was reckoned, so a first plan misses and more bytes are taken."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    measure, factors = trial.plan_divergence, []

    def more(*arguments: Any) -> Divergence:
        found = measure(*arguments)
        factors.append(0.015 / found.kld_mean)
        return replace(found, kld_mean=factors[0] * found.kld_mean)

    out = tmp_path / "out"
    arguments = ["export", "demo", str(out), "--format", "gguf", "--onnx-vision", "none", *QUICK]
    assert main([*arguments, "--budget", "kld<0.01", "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.plan.json"]
    first = json.loads((tmp_path / "out.plan.json").read_text())
    assert first["kld"]["measured"] is None
    assert first["kld"]["sum"] <= 0.01
    (tmp_path / "out.plan.json").unlink()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(trial, "plan_divergence", more)
        assert main([*arguments, "--budget", "kld<0.01"]) == 0
    assert "more are taken" in capsys.readouterr().err
    document = json.loads((tmp_path / "out.plan.json").read_text())
    assert document["kld"]["measured"] <= 0.01
    assert document["bytes"] > first["bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.plan.json"]
    assert (out / "model-q4_0-mixed.gguf").is_file()
    again = str(tmp_path / "again")
    assert main([*arguments[:2], again, *arguments[3:7], *QUICK[-2:], "--plan", str(tmp_path / "out.plan.json")]) == 0
    files = [Manifest.read(each).files["model-q4_0-mixed.gguf"] for each in (out, Path(again))]
    assert files[0] == files[1]


def test_an_interrupted_measurement_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*QUICK, "--size", "4.9bpw"]
    assert main(["export", "demo", str(tmp_path / "whole"), *arguments]) == 0
    out = tmp_path / "out"
    run = Calibration.run

    def interrupted(self: Calibration, consumer: Consumer, progress: Progress) -> None:
        def stop(layer: LayerInputs) -> None:
            if layer.index == 2:
                raise KeyboardInterrupt
            consumer(layer)

        run(self, stop, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "run", interrupted)
        assert main(["export", "demo", str(out), *arguments]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work", "whole", "whole.plan.json"]
    with monkeypatch.context() as patch:  # and once more, when all is measured
        patch.setattr(trial, "plan_divergence", _interrupt)
        assert main(["export", "demo", str(out), *arguments]) == 130
    assert not out.exists()
    assert main(["export", "demo", str(out), *arguments]) == 0
    assert not (tmp_path / "out.work").exists()
    assert (tmp_path / "out.plan.json").read_bytes() == (tmp_path / "whole.plan.json").read_bytes()
    assert Manifest.read(out).files == Manifest.read(tmp_path / "whole").files


def _interrupt(*arguments: Any) -> Divergence:
    raise KeyboardInterrupt


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ("export", "demo", str(tmp_path / "out"))
    size = ("--size", "4.6bpw")
    for more, said in [
        ((*size, "--budget", "kld<1"), "give one of them"),
        ((*size, "--decoder", "int4"), "--decoder does not go with --size"),
        (("--budget", "kld<1", "--head", "f16"), "--head does not go with --budget"),
        (("--held-out-tokens", "5"), "--held-out-tokens goes with --size or --budget"),
        ((*size, "--held-out-tokens", "0"), "--held-out-tokens is 0"),
        (("--size", "4.6"), "--size is '4.6': give bits per weight, such as 4.6bpw"),
        (("--size", "0bpw"), "--size is '0bpw'"),
        (("--budget", "ppl<3"), "--budget is 'ppl<3': give a mean KL divergence"),
        (("--asymmetric", "--format", "gguf"), "--asymmetric does not go with --format gguf"),
    ]:
        assert said in _fails(capsys, *export, *more)
    assert not (tmp_path / "out").exists()


def test_the_work_directory_is_nobody_elses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("export", "demo", str(tmp_path / "out"), "--size", "4.9bpw", *QUICK)
    letter = tmp_path / "out.work" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("mine")
    assert "out.work is neither empty nor of a measurement" in _fails(capsys, *arguments)
    assert letter.read_text() == "mine"
    letter.unlink()
    letter.parent.rmdir()
    monkeypatch.setattr(SensitivityMeter, "disk", lambda decoder, positions: 1 << 60)
    assert "measuring needs 1152921504.61 GB" in _fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def _even(types: dict[str, list[StoredType]]) -> dict[str, Sensitivity]:
    """All matrices alike; each type has half the error of the one before it."""
    return {
        name: Sensitivity(0.01, {each.label: 0.5**at for at, each in enumerate(kinds)}) for name, kinds in types.items()
    }


@pytest.mark.parametrize("asymmetric", [False, True])
def test_targets_of_onnx(asymmetric: bool, checkpoint: Checkpoint) -> None:
    types = onnx_types(checkpoint, METHODS["rtn"], 32, asymmetric=asymmetric)
    base = plan_export(checkpoint, ExportOptions(asymmetric=asymmetric))

    def made(target: Target) -> Plan:
        chosen = mixed_plan(checkpoint, base, types, _even(types), target).overrides("onnx")
        return plan_export(checkpoint, replace(base.options, overrides=chosen))

    small, exact = made(Target.size("5.2 bpw")), made(Target.budget("KLD <= 0.0951"))
    assert 5 < bits_per_weight(small.entries(), *TEXT) <= 5.2
    assert {small.schemes[HEAD].label, exact.schemes[HEAD].label} == {types[HEAD][0].label, "int8 block 32"}
    assert bits_per_weight(exact.entries(), *TEXT) > 8
    whole = base.total_bytes()
    assert whole - 200_000 < made(Target.size(f"{whole / 1e6:.2f}MB")).total_bytes() <= whole + 5000
    for target, said in [
        (Target.size("2bpw"), "2bpw cannot be met: the smallest types take"),
        (Target.size("1MB"), "1MB cannot be met: the smallest types take"),
        (Target.budget("kld<0.09"), "kld<0.09 cannot be met: the most exact types bring a KL divergence of 0.095"),
    ]:
        with pytest.raises(InputError, match=said):
            made(target)


def test_types_of_gguf(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    types, note = gguf_types(checkpoint, METHODS["awq"])
    assert {each.label for kinds in types.values() for each in kinds} == {"Q4_0", "Q8_0"}
    assert note is not None and "awq scales layers" in note
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    ggml._library.cache_clear()
    types, note = gguf_types(checkpoint, METHODS["rtn"])
    ggml._library.cache_clear()
    assert {each.label for kinds in types.values() for each in kinds} == {"Q4_0", "Q8_0"}
    assert note is not None and "phisight[gguf]" in note


def test_plan_files_name_their_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    export = ("export", "demo", str(tmp_path / "out"), "--plan", str(path))
    for text, said in [
        ('{\n"lm_head.weight": "Q6_K"}', "p.json: line 2: the plan has 'q6_k' for lm_head.weight, wanted one of int4"),
        ('{\n\n"lm_head": "f16"}', "p.json: line 3: the plan names lm_head, which this model does not have"),
        (f'{{"{EMBEDDINGS}": "int4 block 32"}}', "wanted one of int8 block 32, f16, f32"),
        ('{"model.norm.weight": "f16"}', "wanted one of f32"),
    ]:
        path.write_text(text)
        assert said in _fails(capsys, *export)
    path.write_text(f'{{"{QKV}": "f16"}}')
    assert "awq scales all matrices" in _fails(capsys, *export, "--method", "awq")
    assert not (tmp_path / "out").exists()
