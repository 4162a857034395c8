"""The export as a whole: the plan, what ends on the disk, and that nothing half-written ever does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from phisight.errors import CheckpointError, InputError, PhisightError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_onnx, plan_export
from phisight.export.output import OutputFile
from phisight.export.plan import ExportOptions, make_plan
from phisight.manifest import Manifest, bits_per_weight

TOWER = "model.vision_tower.vision_tower.vision_model."
DOWN = "model.layers.3.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
FC1 = TOWER + "encoder.layers.0.mlp.fc1.weight"
FC1_BIAS = TOWER + "encoder.layers.0.mlp.fc1.bias"
PATCH = TOWER + "embeddings.patch_embedding.weight"
TABLE = TOWER + "embeddings.position_embedding.weight"
PROJECTOR = "model.mm_projector.2.weight"

Exporter = Callable[..., Path]


def _export(directory: Path, out: Path, *, force: bool = False, **options: Any) -> Manifest:
    checkpoint = Checkpoint.open(directory)
    return export_onnx(checkpoint, plan_export(checkpoint, ExportOptions(**options)), out, force=force)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _set_weight(directory: Path, tensor: str, value: float) -> None:
    """Damage one weight, near the tensor's end."""
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor].reshape(-1)[-2] = value
    save_file(tensors, directory / "model.safetensors")


PLANS: list[tuple[dict[str, Any], list[str]]] = [
    # options -> down_proj, norm, head, embeddings, fc1, its bias, patch embedding, position table, projector
    (
        {},
        ["int4 block 32", "f32", "int8 block 32", "int8 block 32", "int8 channel", "f32", "f32", "f32", "int8 channel"],
    ),
    (
        {"decoder": "int8", "block_size": 128, "vision": "int8"},
        [
            "int8 block 128",
            "f32",
            "int8 block 128",
            "int8 block 32",
            "int8 block 128",
            "f32",
            "f32",
            "f32",
            "int8 block 128",
        ],
    ),
    (
        {"head": "int4", "block_size": 64, "vision": "f32"},
        ["int4 block 64", "f32", "int4 block 64", "int8 block 32", "f32", "f32", "f32", "f32", "f32"],
    ),
    ({"head": "f32"}, ["int4 block 32", "f32", "f32", "f32", "int8 channel", "f32", "f32", "f32", "int8 channel"]),
    ({"decoder": "f32"}, ["f32"] * 9),
    ({"decoder": "f16"}, ["f16", "f32", "f16", "f16", "f16", "f32", "f32", "f32", "f16"]),
    ({"decoder": "f16", "float_type": "f16"}, ["f16"] * 9),
    (
        {"float_type": "f16"},
        ["int4 block 32", "f16", "int8 block 32", "int8 block 32", "f16", "f16", "f16", "f16", "f16"],
    ),
    (
        {"float_type": "f16", "vision": "w8a8"},  # integer products exist with float32 only
        ["int4 block 32", "f16", "int8 block 32", "int8 block 32", "int8 channel", "f32", "f32", "f32", "int8 channel"],
    ),
    (
        {"float_type": "f16", "vision": "int8", "head": "f16"},
        ["int4 block 32", "f16", "f16", "f16", "int8 block 32", "f16", "f16", "f16", "int8 block 32"],
    ),
    (
        {"decoder": "f32", "vision": "int8", "head": "int8"},
        ["f32", "f32", "int8 block 32", "int8 block 32", "int8 block 32", "f32", "f32", "f32", "int8 block 32"],
    ),
]


@pytest.mark.parametrize(("options", "wanted"), PLANS)
def test_plans(tiny_checkpoint: Path, options: dict[str, Any], wanted: list[str]) -> None:
    plan = make_plan(Checkpoint.open(tiny_checkpoint).config, ExportOptions(**options))
    shown = (DOWN, NORM, HEAD, EMBEDDINGS, FC1, FC1_BIAS, PATCH, TABLE, PROJECTOR)
    assert [plan.schemes[name].label for name in shown] == wanted
    assert len(plan.schemes) + len(plan.unused) == 111
    assert len(plan.unused) == 29


def test_options_are_spelled_out() -> None:
    assert ExportOptions().as_json() == {
        "decoder": "int4",
        "vision": "w8a8",
        "block_size": 32,
        "head": "int8",
        "float": "f32",
        "method": "rtn",
        "accuracy_level": 4,
    }


@pytest.mark.parametrize("options", [{"decoder": "f32"}, {"decoder": "int4", "head": "f32"}])
def test_float32_weights_in_a_float16_graph_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="float32 weights in a float16 graph"):
        ExportOptions(float_type="f16", **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("decoder", "int3"),
        ("vision", "int4"),
        ("head", "w8a8"),
        ("block_size", 16),
        ("float_type", "bf16"),
        ("method", "best"),
        ("accuracy_level", 1),
    ],
)
def test_options_that_do_not_exist(option: str, value: object) -> None:
    with pytest.raises(InputError, match=f"is {value!r}, wanted one of"):
        ExportOptions(**{option: value})  # type: ignore[arg-type]


def test_bits_per_weight_by_hand(tiny_checkpoint: Path, exported: Exporter) -> None:
    """Four layers of matrices at 4.5 bits with nine float32 norms of 128; the head at 8.5."""
    tensors = Manifest.read(exported(tiny_checkpoint, decoder="int4")).tensors
    matrices = 4 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256)
    norms = 9 * 128
    assert bits_per_weight(tensors, "decoder") == (matrices * 4.5 + norms * 32) / (matrices + norms)
    assert bits_per_weight(tensors, "head") == bits_per_weight(tensors, "embeddings") == 8.5
    # Two layers of 128 rows, of 64 and 128 weights and a scale of 4 bytes each, and their float32 biases.
    projector = 128 * (64 + 4) + 128 * (128 + 4) + 2 * 128 * 4
    assert bits_per_weight(tensors, "projector") == projector * 8 / (128 * 64 + 128 * 128 + 256)


@pytest.mark.parametrize("options", [options for options, _ in PLANS])
def test_planned_bytes_are_those_on_the_disk(
    tiny_checkpoint: Path, exported: Exporter, options: dict[str, Any]
) -> None:
    """All but the rotation tables and the gaps before tensors, which begin at multiples of 64 (big ones: 65536)."""
    directory = exported(tiny_checkpoint, **options)
    manifest = Manifest.read(directory)
    planned = {part: sum(t.bytes for t in manifest.tensors.values() if t.part == part) for part in ("head", "decoder")}
    float_bytes = 2 if options.get("float_type") == "f16" else 4
    rotation = 2 * 32768 * 16 * float_bytes
    assert _external_bytes(directory / "decoder.onnx") == planned["decoder"] + planned["head"] + rotation
    tower = sum(t.bytes for t in manifest.tensors.values() if t.part in ("vision", "projector"))
    assert _external_bytes(directory / "vision.onnx") == tower
    table = sum(np.load(path).nbytes for path in directory.glob("embeddings*.npy"))
    assert table == sum(t.bytes for t in manifest.tensors.values() if t.part == "embeddings")


def _external_bytes(graph: Path) -> int:
    """Bytes of all tensors in the data file. They lie in it in order, aligned and without overlap, to its very end."""
    end = total = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        alignment = 65536 if length >= 1 << 20 else 64
        assert place["location"] == graph.name + ".data"
        assert offset % alignment == 0
        assert 0 <= offset - end < alignment
        end = offset + length
        total += length
    assert (graph.parent / (graph.name + ".data")).stat().st_size == end
    return total


@pytest.mark.parametrize("options", [{"decoder": "f32"}, {"decoder": "int4"}, {"float_type": "f16"}])
def test_the_vision_graph_is_valid_onnx(tiny_checkpoint: Path, exported: Exporter, options: dict[str, Any]) -> None:
    """The decoder's norms are ONNX Runtime's own operators in the standard domain, which the checker refuses."""
    onnx.checker.check_model(str(exported(tiny_checkpoint, **options) / "vision.onnx"))


def test_the_manifest_tells_of_every_file_and_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    manifest = _export(tiny_checkpoint, out, decoder="int4")
    assert Manifest.read(out) == manifest
    assert manifest.model == Checkpoint.open(tiny_checkpoint).config
    assert manifest.files.keys() == {path.name for path in out.iterdir()} - {"phisight.json"}
    for name, entry in manifest.files.items():
        data = (out / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(manifest.tensors) == 111 - 29
    assert manifest.tensors[DOWN].scheme == "int4 block 32"
    assert manifest.tensors[DOWN].weights == 128 * 256
    assert manifest.tensors[DOWN].bytes == 128 * 8 * 18
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@pytest.mark.parametrize("options", [{"decoder": "int4"}, {"decoder": "f16", "float_type": "f16"}])
def test_the_same_export_twice(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for name in ("one", "two"):
        _export(tiny_checkpoint, tmp_path / name, **options)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_progress_counts_every_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for i, options in enumerate((ExportOptions(), ExportOptions(decoder="f16", vision="int8"))):
        done: list[int] = []
        plan = plan_export(checkpoint, options)
        export_onnx(checkpoint, plan, tmp_path / str(i), progress=done.append)
        assert (
            sum(done)
            == plan.total_weights()
            == sum(t.size for t in checkpoint.tensors.values())
            - sum(checkpoint.tensors[name].size for name in checkpoint.unused)
        )


def test_an_existing_directory_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    _export(tiny_checkpoint, out)
    before = _contents(out)
    with pytest.raises(InputError, match="exists: choose another name, or replace it with --force"):
        _export(tiny_checkpoint, out, decoder="f32")
    assert _contents(out) == before


def test_force_replaces_a_model_and_an_empty_directory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    _export(tiny_checkpoint, out, force=True)
    (out / "note.txt").write_text("of the old model")
    _export(tiny_checkpoint, out, force=True, decoder="f32")
    assert Manifest.read(out).options["decoder"] == "f32"
    assert not (out / "note.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_force_costs_nobody_other_files(tiny_checkpoint: Path, checkpoint_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("years of work")
    for out in (tmp_path / "file", tmp_path / "photos", checkpoint_copy):
        with pytest.raises(InputError, match="neither an exported model nor empty"):
            _export(tiny_checkpoint, out, force=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "photos/one.jpg").read_text() == "years of work"
    Checkpoint.open(checkpoint_copy)


def test_a_place_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a directory: make it first"):
        _export(tiny_checkpoint, tmp_path / "none/model")


@pytest.mark.parametrize(
    ("tensor", "value", "options", "message"),
    [
        (DOWN, np.nan, {"decoder": "int4"}, "weights reach nan, which no float16 scale can hold"),
        (DOWN, np.inf, {"decoder": "int8"}, "weights reach inf"),
        (DOWN, np.nan, {"decoder": "f32"}, "weights reach nan, which float32 cannot hold: the checkpoint is damaged"),
        (DOWN, 1e5, {"decoder": "f16"}, "weights reach 100000.0, which float16 cannot hold: export to f32"),
        (NORM, -np.inf, {"decoder": "int4"}, "which float32 cannot hold"),
        (FC1, np.nan, {"vision": "w8a8"}, "weights are not finite"),
        (FC1_BIAS, np.nan, {"vision": "w8a8"}, "which float32 cannot hold"),
        (EMBEDDINGS, np.nan, {"decoder": "int4"}, "which no float16 scale can hold"),
        (EMBEDDINGS, 1e5, {"decoder": "f16"}, "which float16 cannot hold"),
        (HEAD, 1e9, {"head": "int4"}, "which no float16 scale can hold"),
    ],
)
def test_a_damaged_weight_leaves_everything_as_it_was(
    tiny_checkpoint: Path,
    checkpoint_copy: Path,
    exported: Exporter,
    tmp_path: Path,
    tensor: str,
    value: float,
    options: dict[str, Any],
    message: str,
) -> None:
    old = tmp_path / "old"
    shutil.copytree(exported(tiny_checkpoint), old)
    _set_weight(checkpoint_copy, tensor, value)
    for out in (tmp_path / "new", old):
        with pytest.raises(CheckpointError) as caught:
            _export(checkpoint_copy, out, force=True, **options)
        assert str(caught.value).startswith(f"{tensor}: ")
        assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "old"]
    assert _contents(old) == _contents(exported(tiny_checkpoint))


def test_a_damaged_weight_that_is_not_used_does_no_harm(
    tiny_checkpoint: Path, checkpoint_copy: Path, exported: Exporter, tmp_path: Path
) -> None:
    _set_weight(checkpoint_copy, TOWER + "encoder.layers.3.mlp.fc1.weight", np.nan)
    manifest = _export(checkpoint_copy, tmp_path / "model", decoder="int4")
    assert manifest == Manifest.read(exported(tiny_checkpoint, decoder="int4"))


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_disk_that_fails_leaves_the_old_model_and_what_is_written(
    tiny_checkpoint: Path, exported: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    old = tmp_path / "old"
    shutil.copytree(exported(tiny_checkpoint), old)
    write, rename = OutputFile.write, Path.rename
    written = 0

    def full(self: OutputFile, data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        if failing == "write" and written > 3_000_000:
            raise OSError(28, "No space left on device")
        write(self, data)

    def refused(self: Path, target: Path) -> Path:
        if failing == "rename" and self.name.endswith(".partial"):
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(OutputFile, "write", full)
    monkeypatch.setattr(Path, "rename", refused)
    reason = "No space left on device" if failing == "write" else "Permission denied"
    for out in (tmp_path / "new", old):
        written = 0
        with pytest.raises(PhisightError, match=f"writing {out} failed: {reason}"):
            _export(tiny_checkpoint, out, force=True)
    kept = [".new.journal", ".new.partial", ".old.journal", ".old.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "old"]
    assert _contents(old) == _contents(exported(tiny_checkpoint))


def test_too_little_room_is_found_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**7, 10**7))
    with pytest.raises(InputError, match=r"needs 0\.07 GB, but .* has 0\.01 GB free: make room"):
        _export(tiny_checkpoint, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_its_tokenizer(checkpoint_copy: Path, tmp_path: Path) -> None:
    (checkpoint_copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        _export(checkpoint_copy, tmp_path / "model")


def test_nothing_in_it_depends_on_time_or_place(tiny_checkpoint: Path, checkpoint_copy: Path, tmp_path: Path) -> None:
    """A checkpoint elsewhere gives the same bytes, and no file has a path or a date in it."""
    _export(checkpoint_copy, tmp_path / "here")
    _export(tiny_checkpoint, tmp_path / "there")
    assert _contents(tmp_path / "here") == _contents(tmp_path / "there")
    text = json.dumps(json.loads((tmp_path / "here/phisight.json").read_text()))
    assert str(tmp_path) not in text
