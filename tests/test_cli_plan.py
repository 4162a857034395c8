"""`phisight plan`: the table, the document, earlier rates, the check, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phisight.cli.main import main
from phisight.export.variants import CHOICES, decoder_kind
from phisight.loading import checkpoint_directory


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """Rates of no machine, for all variants, as `plan --json` writes them."""
    decoders = {
        decoder_kind(options): {"matrices": 4e-12, "attention": 1e-11, "weights": 4e-11, "cache": 1e-10}
        for options in CHOICES
    }
    towers = {form: {"matrices": 1e-12, "attention": 2e-12} for form in ("w8a8", "f16")}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"rates": {"threads": 2, "decoders": decoders, "towers": towers, "prepare": 1e-5}}))
    return path


def _plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_real_model_needs_no_file(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _plan(capsys, "--rates", rates, "--memory", "16GB", "--vram", "8GB", "--ttft", "2min")
    rows = {row["name"]: row for row in document["variants"]}
    assert len(rows) == len(CHOICES)
    small, large = rows["ONNX INT4 block 128"], rows["ONNX INT8 block 32"]
    assert small["fits"] and not large["fits"]
    assert small["tokens_per_second"] > 1.5 * large["tokens_per_second"]
    assert small["first_token_s"] > small["encode_s"] + small["prefill_s"]  # pixels are prepared too
    assert 256 <= small["patches_within_ttft"] < 3600
    assert rows["GGUF Q4_0"]["gpu"]["layers"] > 20 and small["gpu"] is None
    assert "--block-size 128" in small["command"]
    assert document["machine"]["read_bytes_per_second"] is None  # nothing was measured
    less = _plan(capsys, "--rates", rates, "--max-patches", "256", "--images", "2")["variants"][0]
    assert less["first_token_s"] < 0.3 * rows["ONNX INT4 block 32"]["first_token_s"]


def test_an_int8_cache_takes_less(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, small = (_plan(capsys, "--rates", rates, *kv)["variants"] for kv in ((), ("--kv", "int8")))
    for a, b in zip(plain, small, strict=True):
        share = 1 / 4 if a["name"].startswith("ONNX") else 34 / 64
        assert b["memory"]["kv"] == pytest.approx(share * a["memory"]["kv"])
        assert b["command"] == a["command"] + (" --kv int8" if a["name"].startswith("ONNX") else "")
    assert plain[0]["memory"]["kv"] == 5067 * 400 * 1024
    assert main(["plan", "--rates", str(rates), "--kv", "int8"]) == 0
    assert "KV cache: int8" in capsys.readouterr().out


def test_an_int8_cache_of_an_exported_model(
    rates: Path, exported: Callable[..., Path], exported_gguf: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX models must have been exported for it; both are told when they run."""
    made = checkpoint_directory("demo")
    int8 = exported(made, decoder="int4", kv="int8")
    for model in (int8, exported_gguf(made, decoder="Q4_0")):
        (row,) = _plan(capsys, str(model), "--rates", rates, "--kv", "int8")["variants"]
        assert row["command"].endswith("--kv int8")
    assert main(["plan", str(int8), "--check", "--kv", "int8", "--rates", str(rates)]) == 2
    assert "measures a float KV cache" in capsys.readouterr().err
    assert main(["plan", "demo", "--rates", str(rates), "--kv", "int8"]) == 2
    assert "demo was exported without it: plan its checkpoint, or export it" in capsys.readouterr().err


def test_the_table_says_where_numbers_come_from(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rates", str(rates), "--memory", "64GB", "--vram", "8GB", "--ttft", "60s"]) == 0
    said = capsys.readouterr().out
    for part in ("files: exact", "memory: reckoned", f"from {rates}", "not told", "phisight export CHECKPOINT"):
        assert part in said, part


def test_a_model_is_planned_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    document = _plan(capsys, "demo", "--check")
    (row,) = document["variants"]
    assert row["fits"] and row["first_token_s"] > 0
    checks = {check["name"]: check for check in document["check"]}
    assert {"memory while opening", "memory at most", "first token", "decoding step"} <= checks.keys()
    for check in checks.values():
        assert check["deviation"] == pytest.approx(check["predicted"] / check["measured"] - 1)
        assert check["within"] == (abs(check["deviation"]) <= check["allowed"])
    assert abs(checks["memory at most"]["deviation"]) < 0.3  # mostly the process itself
    assert document["rates"]["decoders"].keys() == {"onnx int8 block 32"}
    assert document["machine"]["integer_operations_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "much"], "--memory is 'much'"),
        (["--vram", "0"], "--vram is '0'"),
        (["--ttft", "soon"], "--ttft is 'soon'"),
        (["--images", "-1"], "--images is -1"),
        (["--max-patches", "9999"], "--max-patches is 9999"),
        (["--context", "100"], "--context is 100"),
        (["--images", "50"], "32768"),
        (["--check"], "not exported"),
        (["--rates", "absent.json"], "absent.json"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_rates_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"stages": {}}))
    assert main(["plan", "--rates", str(path)]) == 2
    assert "plan --json" in capsys.readouterr().err
