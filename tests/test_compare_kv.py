"""`phisight compare` with KV caches of several types: their own rows, and what they alone bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phisight.cli.main import main
from phisight.loading import checkpoint_directory

Exported = Callable[..., Path]
DEMO = checkpoint_directory("demo")


def compared(tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    out = tmp_path / "out"
    assert main(["compare", *arguments, "--out", str(out), "--n", "1", "--stages", "--threads", "1"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {each["name"]: each for each in (report["reference"], *report["variants"])}


def test_onnx(exported: Exported, tmp_path: Path) -> None:
    both = exported(DEMO, decoder="f32", vision="f32", kv="int8")
    plain = exported(DEMO, decoder="int8", vision="f32")
    int8 = f"{both.name}@kv=int8"
    found = compared(tmp_path, str(both), f"{both}@kv=int8", str(plain))
    assert [found[name]["kv"] for name in (both.name, int8, plain.name)] == ["f32", "int8", "f32"]
    variant = found[int8]
    # Nothing else differs, so that what the stage brings is all that there is.
    assert 0 < variant["kld"]["mean"] < 0.05
    assert variant["stages"]["KV cache"] == pytest.approx(variant["kld"]["mean"])
    assert variant["stages"]["decoder"] == pytest.approx(variant["kld"]["mean"])
    assert variant["stages"]["vision"] == variant["stages"]["embeddings"] == 0
    assert found[plain.name]["stages"]["KV cache"] == 0 < found[plain.name]["stages"]["decoder"]


def test_gguf(exported_gguf: Exported, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    directory = exported_gguf(DEMO, decoder="F32", vision="F32")
    both = exported(DEMO, decoder="f32", vision="f32", kv="int8")
    found = compared(tmp_path, f"{directory}@kv=f32", str(directory), f"{directory}@kv=q8_0", f"{both}@kv=int8")
    reference, half, eight, other = found.values()
    assert [each["kv"] for each in found.values()] == ["f32", "f16", "q8_0", "int8"]
    assert 0 < half["stages"]["KV cache"] < eight["stages"]["KV cache"]
    assert eight["stages"]["KV cache"] == pytest.approx(eight["kld"]["mean"])
    assert other["stages"]["KV cache"] is None  # llama.cpp has no such type
    assert reference["name"].endswith("@kv=f32")


def test_what_cannot_be_compared(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = exported(DEMO, decoder="int8", vision="f32")
    for variant, said in (
        ("demo@kv=q4_0", "there is no KV cache of type q4_0: give one of f32, f16, q8_0, int8"),
        ("demo@kv=int8", "needs scales measured at export"),
        (f"{DEMO}@kv=int8", "is a checkpoint, whose KV cache is f32"),
    ):
        assert main(["compare", str(plain), variant, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out/report.json").exists()
