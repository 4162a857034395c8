"""`phisight imatrix`, and its file in `phisight export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phisight.cli.main import main
from phisight.export.calibration.run import Calibration
from phisight.manifest import Manifest
from phisight.quant.imatrix import ImportanceMatrix

QUICK = ("--tokens", "400", "--threads", "1")


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("phisight: error: ")
    return error


def test_a_matrix_and_an_export_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    out = tmp_path / "demo.imatrix.gguf"
    assert main(["imatrix", "demo", str(out), *QUICK, "--image-token-weight", "0.5", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "built-in text" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    matrix = ImportanceMatrix.read(out)
    assert report["weights"] == len(matrix.weights) == 17
    assert report["sha256"] == matrix.digest
    totals = report["calibration"]
    assert totals["image_tokens"] > 100
    counted = totals["text_tokens"] + totals["image_tokens"] / 2
    assert abs(matrix.weights["output.weight"].counts[0] - counted) <= 0.5

    model = tmp_path / "model"
    arguments = ["export", "demo", str(model), "--format", "gguf", "--decoder", "q4_k_m", "--onnx-vision", "none"]
    assert main([*arguments, "--imatrix", str(out)]) == 0
    assert Manifest.read(model).options["imatrix"] == matrix.digest
    capsys.readouterr()
    assert "no use for q4_0" in _fails(
        capsys, "export", "demo", str(tmp_path / "x"), "--format", "gguf", "--imatrix", str(out)
    )
    assert "--imatrix does not go with --format onnx" in _fails(
        capsys, "export", "demo", str(tmp_path / "x"), "--imatrix", str(out)
    )


def test_an_interrupted_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["imatrix", "demo", str(tmp_path / "whole.gguf"), *QUICK]) == 0
    out = tmp_path / "out.gguf"
    run = Calibration.run

    def interrupted(self: Calibration, progress: object = None) -> None:
        def stop(layer: object) -> None:
            if getattr(layer, "index", 0) == 2:
                raise KeyboardInterrupt

        run(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "run", interrupted)
        assert main(["imatrix", "demo", str(out), *QUICK]) == 130
    assert "phisight: interrupted" in capsys.readouterr().err
    assert not out.exists()
    assert "another checkpoint, other data" in _fails(capsys, "imatrix", "demo", str(out), "--tokens", "300")
    assert main(["imatrix", "demo", str(out), *QUICK]) == 0
    assert "going on from there" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()


def test_what_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert "is not a directory" in _fails(capsys, "imatrix", "demo", str(tmp_path / "no/out.gguf"))
    assert "is not there" in _fails(capsys, "imatrix", "demo", str(out), "--calibration", str(tmp_path / "no"))
    assert "image_token_weight is -1" in _fails(capsys, "imatrix", "demo", str(out), "--image-token-weight", "-1")
    out.write_text("a letter")
    assert "exists" in _fails(capsys, "imatrix", "demo", str(out))
    assert "no importance matrix" in _fails(capsys, "imatrix", "demo", str(out), "--force")
    assert out.read_text() == "a letter"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
