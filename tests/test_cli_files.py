"""The commands that make and describe files: export, info, verify, tokens, resize."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import phisight
from phisight.cli.main import main
from phisight.manifest import Manifest
from phisight.naflex import resize


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails for bad input."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("phisight: error: ")
    return err


def test_export_then_info_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert main(["export", "demo", str(out), "--decoder", "int4", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["options"]["decoder"] == "int4"
    assert (
        report["bytes"] == sum(path.stat().st_size for path in out.iterdir()) - (out / "phisight.json").stat().st_size
    )
    assert "bits/weight" in captured.err

    assert main(["info", str(out), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    # Blocks of 32 weights of 4 bits and a float16 scale: 4.5 bits. The decoder's nine norms of 256 are float32.
    blocks = sum(t["bytes"] for t in info["tensors"].values() if t["scheme"] == "int4 block 32")
    weights = sum(t["weights"] for t in info["tensors"].values() if t["scheme"] == "int4 block 32")
    assert blocks * 8 / weights == 4.5
    assert info["bits_per_weight"]["decoder"] == pytest.approx((weights * 4.5 + 9 * 256 * 32) / (weights + 9 * 256))

    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    damaged = out / "decoder.onnx.data"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert "decoder.onnx.data" in _error(capsys, "verify", str(out))


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", str(tmp_path / "model"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["tensors"]["lm_head.weight"]["scheme"] == "int8 block 32"
    assert len(plan["unused"]) == 29
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_effect_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", str(tmp_path / "m"), "--decoder", "f32", "--method", "rtn", "--dry-run"]) == 0
    assert "--method rtn has no effect" in capsys.readouterr().err


def test_export_refuses_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert "exists" in _error(capsys, "export", "demo", str(taken))
    assert "--force does not replace it" in _error(capsys, "export", "demo", str(taken), "--force")
    assert (taken / "thesis.txt").read_text() == "years of work"
    assert "not a directory" in _error(capsys, "export", str(tmp_path / "none"), str(tmp_path / "m"))
    assert "config.json" in _error(capsys, "export", str(taken), str(tmp_path / "m"))
    assert "f32" in _error(capsys, "export", "demo", str(tmp_path / "m"), "--float", "f16", "--decoder", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_info_knows_checkpoints_and_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert main(["info", info["checkpoint"], "--json"]) == 0
    checkpoint = json.loads(capsys.readouterr().out)
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["weights"] == 5177600
    used = sum(tensor["weights"] for tensor in info["tensors"].values())
    unused = sum(np.prod(t["shape"]) for t in checkpoint["tensors"].values() if t["part"] == "unused")
    assert used + unused == checkpoint["weights"]


def test_the_built_in_model_is_its_checkpoint_exported(tmp_path: Path) -> None:
    shipped = Path(phisight.__file__).parent / "demo"
    assert main(["export", "demo", str(tmp_path / "again"), "--decoder", "int8", "--json"]) == 0
    assert Manifest.read(tmp_path / "again").files == Manifest.read(shipped / "onnx").files


def test_what_is_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not there" in _error(capsys, "info", str(tmp_path / "none"))
    assert "no phisight.json" in _error(capsys, "verify", str(tmp_path))
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert "does not begin with GGUF" in _error(capsys, "info", str(picture))


def test_a_newer_schema_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(phisight.__file__).parent / "demo/onnx", model)
    (model / "vision.onnx.data").unlink()
    assert "vision.onnx.data is missing" in _error(capsys, "info", str(model))
    manifest = json.loads((model / "phisight.json").read_text())
    (model / "phisight.json").write_text(json.dumps(manifest | {"schema": 2}))
    assert "schema 2" in _error(capsys, "info", str(model))


def test_tokens_of_sizes_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (800, 600)).save(tmp_path / "a.png")
    assert main(["tokens", "800x600", str(tmp_path / "a.png"), "17x31", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    # 800x600 is seen as 800x592 (50 x 37 patches), 17x31 as 192x336 (12 x 21): the reference's sizes.
    assert [row["tokens"] for row in rows] == [1850, 1850, 252]
    assert rows[0]["seen"] == [800, 592]
    assert main(["tokens", "800x600", "--max-patches", "64"]) == 0
    assert int(capsys.readouterr().out.split(": ")[1].split(" ")[0]) <= 64
    assert "0" in _error(capsys, "tokens", "0x5")


def test_resize_writes_what_the_model_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "in.png"
    Image.fromarray(rng.integers(0, 256, (61, 47, 3), np.uint8)).save(source)
    out = tmp_path / "out.png"
    assert main(["resize", str(source), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with Image.open(out) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(resize(source)))
        assert list(written.size) == report["seen"]
        # What it wrote passes unchanged.
        np.testing.assert_array_equal(np.asarray(resize(written)), np.asarray(written))
    assert "exists" in _error(capsys, "resize", str(source), str(out))
    assert ".png" in _error(capsys, "resize", str(source), str(tmp_path / "out.jpg"))
    assert "does not exist" in _error(capsys, "resize", str(tmp_path / "none.png"), str(tmp_path / "b.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_gguf_export_and_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"blk.0.ffn_down.weight": "q8_0"}')
    out = tmp_path / "model"
    export = ["export", "demo", str(out), "--format", "gguf"]
    assert main([*export, "--plan", str(plan), "--onnx-vision", "none", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["options"] == {
        "format": "gguf",
        "decoder": "q4_0",
        "vision": "f16",
        "onnx_vision": "none",
        "overrides": 1,
    }
    assert report["plan"]["tensors"]["model.layers.0.mlp.down_proj.weight"]["scheme"] == "q8_0"
    assert "llama-server -m" in captured.err
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert "--head does not go with --format gguf" in _error(capsys, *export, "--head", "int8")
    plan.write_text("[]")
    assert "wanted an object of types by tensor" in _error(capsys, *export, "--force", "--plan", str(plan))
    assert "wanted one of F32" in _error(capsys, *export, "--force", "--vision", "w8a8")


def test_info_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", str(tmp_path / "m"), "--format", "gguf", "--onnx-vision", "none"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "m/model-q4_0.gguf"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["metadata"]["phi3.block_count"] == 4
    assert info["metadata"]["tokenizer.ggml.tokens"] == "[832 values]"
    assert info["tensors"]["output.weight"] == {
        "shape": [832, 256],
        "type": "Q6_K",
        "weights": 832 * 256,
        "bytes": 832 * 210,
    }
    assert main(["info", str(tmp_path / "m/mmproj-f16.gguf")]) == 0
    assert "clip.projector_type = phi4" in capsys.readouterr().out
