"""Baselines of `phisight compare`: real quantisers, rows that are absent, and refusals."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import phisight
from phisight.cli import baselines as baselines_module
from phisight.cli.baselines import Baseline, parse_baseline
from phisight.cli.main import main
from phisight.compare.subjects import subjects_of
from phisight.errors import EngineError, InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.dynamic_int8 import SCHEME, export_dynamic_int8
from phisight.loading import checkpoint_directory
from phisight.manifest import Manifest
from phisight.quant.imatrix import ImportanceMatrix, SquareSums
from phisight.quant.llama_quantize import file_type, quantize_gguf

DEMO = checkpoint_directory("demo")
PICTURE = Path(phisight.__file__).parent / "demo/pictures/price.png"
CODE = os.environ.get("PHISIGHT_REFERENCE_CODE", "")
"""The folder of the publisher's modeling_phi4_visionr.py."""

Captured = pytest.CaptureFixture[str]
Exported = Callable[..., Path]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """One question about one picture."""
    folder = tmp_path / "ours"
    folder.mkdir()
    case = {"image": str(PICTURE), "question": "What does the text say?", "expected": "6.75", "metric": "contains"}
    (folder / "cases.jsonl").write_text(json.dumps(case), encoding="utf-8")
    return folder


def compared(*arguments: str | Path) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--threads", "1"]) == 0
    out = Path(arguments[arguments.index("--out") + 1])
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def test_quantisers_of_others(
    exported: Exported, ours: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    f32, out = exported(DEMO, decoder="f32", vision="f32"), tmp_path / "out"
    asked = ["--checkpoint", "demo", "--baseline", "llama.cpp:q4_0", "--baseline", "onnxruntime:int8"]
    report = compared(f32, *asked, "--out", out, "--data", ours)
    q4, int8 = report["variants"]
    assert [each["name"] for each in (q4, int8)] == ["llama.cpp Q4_0", "onnxruntime INT8"]
    assert [each["format"] for each in (q4, int8)] == ["gguf", "onnx"]
    assert q4["baseline"] and int8["baseline"] and not report["reference"]["baseline"]
    assert 0 < int8["kld"]["mean"] < q4["kld"]["mean"]
    assert 4.5 <= q4["bpw"] < 5.2
    assert q4["bytes"] < int8["bytes"] < report["reference"]["bytes"]
    assert report["absent"] == []
    # Nothing is made twice; what cannot be made here is a row in all three forms.
    monkeypatch.setattr("phisight.quant.llama_quantize.quantize_gguf", None)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    capsys.readouterr()
    again = compared(f32, *asked, "--out", out, "--data", ours)
    assert [each["name"] for each in again["variants"]] == ["llama.cpp Q4_0"]
    (row,) = again["absent"]
    assert row["name"] == "onnxruntime INT8"
    assert row["install"] == 'pip install "phisight[baselines]"'
    assert "onnxruntime INT8: absent, " in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "onnxruntime INT8" in page
    assert "phisight[baselines]" in page


def test_a_matrix_changes_the_file_and_a_failure_leaves_none(exported_gguf: Exported, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    floats = exported_gguf(DEMO, decoder="F32") / "model-f32.gguf"
    names = [tensor.name for tensor in gguf.GGUFReader(floats).tensors if tensor.name.endswith("ffn_up.weight")]
    sums = np.geomspace(1e-3, 1e3, 256).astype(np.float32)[None]
    matrix = tmp_path / "matrix.gguf"
    ImportanceMatrix({name: SquareSums(sums, np.ones(1, np.float32)) for name in names}).write(matrix)
    steps: list[tuple[int, int]] = []
    quantize_gguf(floats, tmp_path / "plain.gguf", "q4_k_s", progress=lambda done, total: steps.append((done, total)))
    quantize_gguf(floats, tmp_path / "weighed.gguf", "Q4_K_S", imatrix=matrix)
    assert steps[0][0] == 1
    assert steps[-1][0] == steps[-1][1] == len(gguf.GGUFReader(floats).tensors)
    plain, weighed = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("plain.gguf", "weighed.gguf")
    )
    assert {name for name, data in plain.items() if weighed[name] != data} == set(names)
    with pytest.raises(EngineError, match="requires an imatrix"):
        quantize_gguf(floats, tmp_path / "iq1.gguf", "iq1_s")
    with pytest.raises(InputError, match="no importance matrix"):
        quantize_gguf(floats, tmp_path / "iq1.gguf", "iq1_s", imatrix=PICTURE)
    assert not list(tmp_path.glob("iq1*"))


def test_types_by_llama_cpps_names() -> None:
    assert (file_type("q4_k_m"), file_type("Q8_0"), file_type("F16")) == (15, 7, 1)
    with pytest.raises(InputError, match=r"no type 'q9'.*Q4_K_M"):
        file_type("q9")


def test_the_int8_decoder_is_a_model_directory(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    export_dynamic_int8(Checkpoint.open(DEMO), out)
    manifest = Manifest.read(out)
    manifest.verify(out)
    assert sorted(file.name for file in out.iterdir()) == sorted([*manifest.files, "phisight.json"])
    schemes = {entry.part: entry.scheme for name, entry in manifest.tensors.items() if "norm" not in name}
    assert (schemes["decoder"], schemes["head"], schemes["embeddings"]) == (SCHEME, SCHEME, "f32")
    matrices = sum(entry.bytes for entry in manifest.tensors.values() if entry.scheme == SCHEME)
    assert 0 < manifest.files["decoder.onnx.data"].bytes - matrices < 1 << 20  # norms and the rotation's table
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_baseline(tmp_path: Path, capsys: Captured, exported: Exported) -> None:
    assert parse_baseline("llama.cpp:q8_0") == Baseline("llama.cpp", "Q8_0")
    for wrong in ("llama.cpp", "llama.cpp:", "onnxruntime:int4", "transformers", "q4_0", ""):
        with pytest.raises(InputError, match="--baseline is "):
            parse_baseline(wrong)
    with pytest.raises(InputError, match="none is no file"):
        parse_baseline("llama.cpp:Q4_0+none")
    with pytest.raises(InputError, match=r"holds no modeling_phi4_visionr\.py"):
        parse_baseline(f"transformers:{tmp_path}")
    f32 = exported(DEMO, decoder="f32", vision="f32")
    assert main(["compare", str(f32), "--out", str(tmp_path / "out"), "--baseline", "onnxruntime:int8"]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    arguments = ["compare", "demo", "--out", str(tmp_path / "out"), "--baseline", "llama.cpp:q9"]
    assert main(arguments) == 2
    assert "llama.cpp has no type 'Q9'" in capsys.readouterr().err


def test_a_model_beyond_memory_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines_module, "MOST_BYTES", 1 << 20)
    console = baselines_module.Console()
    asked = [Baseline("onnxruntime", "int8")]
    made, (row,) = baselines_module.make_baselines(asked, DEMO, tmp_path / "work", 1, console)
    assert made == []
    assert "in memory" in row.reason
    assert row.install is None


@pytest.mark.skipif(not CODE, reason="PHISIGHT_REFERENCE_CODE names no folder with the publisher's code")
def test_the_publishers_code(exported: Exported, ours: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra [baselines] is not installed")
    f32 = exported(DEMO, decoder="f32", vision="f32")
    report = compared(
        f32, "--checkpoint", "demo", "--baseline", f"transformers:{CODE}", "--out", tmp_path / "out", "--data", ours
    )
    (row,) = report["variants"]
    assert (row["name"], row["format"], row["bpw"]) == ("transformers F32", "transformers", 16)
    assert row["kld"]["max"] < 1e-6
    assert row["same_answers"] == 1


def test_a_checkpoint_is_described_for_the_publishers_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without running it."""
    (tmp_path / "modeling_phi4_visionr.py").write_text("raise ValueError('not for you')")
    monkeypatch.setattr(baselines_module, "import_module", lambda name: None)
    asked = [parse_baseline(f"transformers:{tmp_path}")]
    console = baselines_module.Console()
    (source,), absent = baselines_module.make_baselines(asked, DEMO, tmp_path / "work", 1, console)
    assert absent == []
    (subject,) = subjects_of(source, phisight.compare.subjects.Opening())
    assert (subject.format, subject.accuracy_level, subject.bpw, subject.bpw_all) == ("transformers", None, 16, 16)
    assert subject.embeddings() is None
