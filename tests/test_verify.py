"""`phisight verify --against`: what an export holds, beside its checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phisight.cli.main import main
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, plan_gguf
from phisight.export.gguf_plan import GgufOptions
from phisight.export.verification import TensorCheck, compare_with_checkpoint

Exporter = Callable[..., Path]

QKV = "model.layers.1.self_attn.qkv_proj.weight"
FC1 = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"


def _checks(model: Path, checkpoint: Path) -> dict[str, TensorCheck]:
    return {check.name: check for check in compare_with_checkpoint(model, Checkpoint.open(checkpoint))}


def _change(checkpoint: Path, name: str, change: Callable[[Any], Any]) -> None:
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = np.ascontiguousarray(change(tensors[name]))
            save_file(tensors, path)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "f32"},
        {"decoder": "f16", "float_type": "f16"},
        {"decoder": "int4"},
        {"decoder": "int4", "asymmetric": True, "block_size": 64, "vision": "int8", "head": "int4"},
        {"decoder": "int8", "vision": "f16", "image_attention": "bidirectional"},
    ],
    ids=str,
)
def test_an_export_holds_its_checkpoint(tiny_checkpoint: Path, exported: Exporter, options: dict[str, Any]) -> None:
    checks = _checks(exported(tiny_checkpoint, **options), tiny_checkpoint)
    assert len(checks) == 82
    assert all(check.ok for check in checks.values()), [check for check in checks.values() if not check.ok]
    errors = [check.error for check in checks.values() if check.scheme == "f32"]
    assert not errors or max(errors) == 0
    assert all(0.01 < c.error < 0.2 for c in checks.values() if c.scheme.startswith("int4"))


@pytest.mark.parametrize("decoder", ["Q4_0", "Q8_0", "BF16"])
def test_gguf_holds_it_too(tiny_checkpoint: Path, exported_gguf: Exporter, decoder: str) -> None:
    checks = _checks(exported_gguf(tiny_checkpoint, decoder=decoder), tiny_checkpoint)
    assert len(checks) == 82
    assert all(check.ok for check in checks.values()), [check for check in checks.values() if not check.ok]


def test_gguf_with_the_tower_as_onnx_and_ggml_types(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parent.parent / "runtime/demo/checkpoint"
    opened = Checkpoint.open(checkpoint)
    export_gguf(opened, plan_gguf(opened, GgufOptions(decoder="Q4_K_M")), tmp_path / "out")
    checks = _checks(tmp_path / "out", checkpoint)
    assert any(name.startswith("vision.onnx/") for name in checks)
    assert {"q4_k", "q6_k", "int8 channel"} <= {check.scheme for check in checks.values()}
    assert all(check.ok for check in checks.values()), [check for check in checks.values() if not check.ok]


@pytest.mark.parametrize("name", [QKV, FC1, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_wrong_tensor_is_named(
    tiny_checkpoint: Path, checkpoint_copy: Path, exported: Exporter, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two neighbouring rows or values that changed places."""
    _change(checkpoint_copy, name, lambda values: np.roll(values, 1, axis=0))
    model = exported(tiny_checkpoint, decoder="int4")
    assert main(["verify", str(model), "--against", str(checkpoint_copy)]) == 2
    assert f"does not hold {checkpoint_copy}: {name} (" in capsys.readouterr().err
    assert main(["verify", str(model), "--against", str(checkpoint_copy), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [label for label, check in report["tensors"].items() if not check["ok"]] == [name]


def test_scaled_channels_are_no_fault_but_other_weights_are(
    tiny_checkpoint: Path, checkpoint_copy: Path, exported: Exporter, tmp_path: Path
) -> None:
    """A method such as awq multiplies rows and columns; then only what no factors explain counts."""
    columns = np.linspace(0.5, 2, load_file(next(checkpoint_copy.glob("*.safetensors")))["model.norm.weight"].size)
    _change(checkpoint_copy, QKV, lambda w: (w.astype(np.float32) * columns).astype(w.dtype))
    model = tmp_path / "model"
    shutil.copytree(exported(checkpoint_copy, decoder="int4"), model)
    assert not _checks(model, tiny_checkpoint)[QKV].ok
    manifest = json.loads((model / "phisight.json").read_text())
    manifest["options"]["method"] = "awq"
    (model / "phisight.json").write_text(json.dumps(manifest))
    assert _checks(model, tiny_checkpoint)[QKV].ok
    _change(checkpoint_copy, QKV, lambda w: np.roll(w, 1, axis=1))
    assert not _checks(model, checkpoint_copy)[QKV].ok


def test_a_checkpoint_of_another_shape(tiny_checkpoint: Path, exported: Exporter) -> None:
    demo = Path(__file__).parent.parent / "runtime/demo/checkpoint"
    with pytest.raises(InputError, match="is not of the shape of"):
        _checks(exported(tiny_checkpoint), demo)


def test_the_table_says_what_each_scheme_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "demo", "--against", "demo"]) == 0
    out = capsys.readouterr().out
    assert "int8 channel" in out
    assert "nearest to it" in out
