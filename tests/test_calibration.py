"""Calibration layer by layer: statistics against a plain NumPy forward, kills, replaced weights, weights of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.config import DecoderConfig
from phisight.errors import CheckpointError, InputError, PhisightError
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.export.calibration.fold import AwqQuantizer
from phisight.export.calibration.run import Calibration, CalibrationOptions, Consumer, LayerInputs
from phisight.export.calibration.sources import read_calibration
from phisight.export.calibration.statistics import GatheredSum
from phisight.export.checkpoint import Checkpoint
from phisight.export.plan import ExportOptions, make_plan
from phisight.export.quantized import QuantizedWeights
from phisight.quant.blocks import dequantize_blocks
from phisight.quant.methods.base import InputStatistics
from phisight.quant.scheme import BlockScheme

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
LAYER_WEIGHTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

Array = NDArray[np.float64]
Seen = dict[str, InputStatistics]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(DEMO)


@pytest.fixture(scope="module")
def data(checkpoint: Checkpoint) -> CalibrationData:
    return read_calibration("demo", DEMO, checkpoint.config, tokens=500)


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> phisight.Model:
    """The built-in model as the exporter and the runtime have it, in float32."""
    return phisight.load(exported(DEMO, decoder="f32"), threads=1)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, data: CalibrationData, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Statistics with Hessians of a calibration that nothing disturbs."""
    return _run(Calibration(checkpoint, data, tmp_path_factory.mktemp("w") / "w", CalibrationOptions(hessians=True)))


def _run(calibration: Calibration, consumer: Consumer = lambda layer: None) -> Seen:
    seen: Seen = {}

    def keep(layer: LayerInputs) -> None:
        seen.update(layer.statistics)
        consumer(layer)

    calibration.run(keep)
    return seen


def _equal(first: Seen, second: Seen) -> None:
    assert first.keys() == second.keys()
    for name, each in first.items():
        np.testing.assert_array_equal(each.second_moment, second[name].second_moment)
        if each.hessian is not None and second[name].hessian is not None:
            np.testing.assert_array_equal(each.hessian, second[name].hessian)
        assert each.count == second[name].count


def _weights(checkpoint: Checkpoint) -> dict[str, Array]:
    return {name: tensor.load().astype(np.float64) for name, tensor in checkpoint.tensors.items()}


def _layer_inputs(weights: dict[str, Array], config: DecoderConfig, x: Array) -> dict[str, Array]:
    """What goes into each linear layer for one sequence (n, hidden), by weight: Phi-3 in NumPy, float64."""
    n, size, half = len(x), config.head_dim, config.head_dim // 2
    angle = np.arange(n)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: Array, name: str) -> Array:
        scale: Array = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
        return x / scale * weights[name]

    def rotate(heads: Array) -> Array:
        first, second = heads[..., :half], heads[..., half:]
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

    found = {}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        qkv, o, gate_up, down = (f"{layer}{name}.weight" for name in LAYER_WEIGHTS)
        found[qkv] = norm(x, layer + "input_layernorm.weight")
        heads = (found[qkv] @ weights[qkv].T).reshape(n, -1, size)
        q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
        k, v = (np.repeat(each, config.num_heads // config.num_kv_heads, axis=1) for each in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(size)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(axis=-1, keepdims=True), v)
        found[o] = mixed.reshape(n, -1)
        x = x + found[o] @ weights[o].T
        found[gate_up] = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = np.split(found[gate_up] @ weights[gate_up].T, 2, axis=-1)
        found[down] = gate / (1 + np.exp(-gate)) * up
        x = x + found[down] @ weights[down].T
    found["lm_head.weight"] = norm(x, "model.norm.weight")
    return found


def _reference(
    checkpoint: Checkpoint, data: CalibrationData, model: phisight.Model, image_weight: float = 1
) -> dict[str, Array]:
    """Hessians of all linear layers; features of pictures are those of `model`."""
    weights = _weights(checkpoint)
    sums: dict[str, Array] = {}
    total = 0.0
    for sequence in data.sequences:
        images = iter(sequence.images)
        rows = [
            model.encode_image(next(images)) if id_ < 0 else weights["model.embed_tokens.weight"][[id_]]
            for id_ in sequence.ids
        ]
        counts = np.where(sequence.is_image(), image_weight, 1.0)
        total += counts.sum()
        for name, x in _layer_inputs(weights, checkpoint.config.decoder, np.concatenate(rows)).items():
            sums[name] = sums.get(name, 0) + (x * counts[:, None]).T @ x
    return {name: each / total for name, each in sums.items()}


def test_statistics_are_those_of_a_plain_forward(
    checkpoint: Checkpoint, data: CalibrationData, model: phisight.Model, whole: Seen
) -> None:
    wanted = _reference(checkpoint, data, model)
    assert whole.keys() == wanted.keys()
    assert len(whole) == 4 * checkpoint.config.decoder.num_layers + 1
    for name, hessian in wanted.items():
        found = whole[name]
        assert found.hessian is not None
        assert found.count == data.positions
        assert np.linalg.norm(found.hessian - hessian) < 1e-4 * np.linalg.norm(hessian), name
        np.testing.assert_allclose(found.second_moment, np.diag(hessian), rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(found.hessian, found.hessian.T)


@pytest.mark.parametrize("image_weight", [0.0, 0.25])
def test_image_tokens_count_as_they_are_told(
    checkpoint: Checkpoint,
    data: CalibrationData,
    model: phisight.Model,
    whole: Seen,
    image_weight: float,
    tmp_path: Path,
) -> None:
    options = CalibrationOptions(image_weight, hessians=True)
    found = _run(Calibration(checkpoint, data, tmp_path / "w", options))
    totals = data.as_json()
    for name, hessian in _reference(checkpoint, data, model, image_weight).items():
        assert found[name].count == totals["text_tokens"] + image_weight * totals["image_tokens"]
        np.testing.assert_allclose(found[name].second_moment, np.diag(hessian), rtol=1e-3, atol=1e-6)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert not np.allclose(found[name].second_moment, whole[name].second_moment, rtol=0.05)


def test_text_alone_does_not_depend_on_the_image_weight(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = read_calibration("text", DEMO, checkpoint.config, tokens=100)
    found = [
        _run(Calibration(checkpoint, text, tmp_path / str(weight), CalibrationOptions(weight))) for weight in (0, 1)
    ]
    _equal(*found)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("when", ["consumer", "progress"])
def test_a_killed_run_goes_on(
    when: str, stage: int, checkpoint: Checkpoint, data: CalibrationData, whole: Seen, tmp_path: Path
) -> None:
    """Stopped as a kill would stop it, at any layer, in the middle of a pass or in the consumer."""

    class Killed(BaseException):
        pass

    seen: Seen = {}
    done = 0

    def consumer(layer: LayerInputs) -> None:
        if when == "consumer" and layer.index == stage:
            raise Killed
        seen.update(layer.statistics)

    def progress(positions: int) -> None:
        nonlocal done
        done += positions
        if when == "progress" and done > (stage + 1.5) * data.positions:
            raise Killed

    def again() -> Calibration:
        return Calibration(checkpoint, data, tmp_path / "w", CalibrationOptions(hessians=True))

    first = again()
    assert first.work_left == 6 * data.positions
    with pytest.raises(Killed):
        first.run(consumer, progress)
    assert len(seen) == 4 * stage
    second = again()
    assert second.work_left == (5 - stage) * data.positions
    counted = 0

    def count(positions: int) -> None:
        nonlocal counted
        counted += positions

    second.run(lambda layer: seen.update(layer.statistics), count)
    assert counted == (5 - stage) * data.positions
    _equal(seen, whole)
    _equal(again().moments(), {name: dataclasses.replace(each, hessian=None) for name, each in whole.items()})
    third = again()
    assert third.work_left == 0
    assert _run(third) == {}
    assert not list((tmp_path / "w").glob("boundary-*"))


def test_later_layers_see_replaced_weights(
    checkpoint: Checkpoint, data: CalibrationData, whole: Seen, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]

    def halve(layer: LayerInputs) -> None:
        if layer.index == 1:
            layer.replace(name, tensor.load() / 2, 0)
            with pytest.raises(ValueError, match="are to go there"):
                layer.replace(name, np.zeros((2, 2), np.float32), 0)
            with pytest.raises(KeyError):
                layer.replace("lm_head.weight", tensor.load(), 0)

    found = _run(Calibration(checkpoint, data, tmp_path / "w", CalibrationOptions()), halve)
    before = [n for n in whole if n.startswith(("model.layers.0.", "model.layers.1."))]
    _equal({n: found[n] for n in before}, {n: whole[n] for n in before})
    weights = _weights(checkpoint)
    weights[name] /= 2
    sequence = next(s for s in data.sequences if not s.images)
    plain = _run(Calibration(checkpoint, CalibrationData((sequence,)), tmp_path / "x", CalibrationOptions()), halve)
    x = weights["model.embed_tokens.weight"][list(sequence.ids)]
    for later, inputs in _layer_inputs(weights, checkpoint.config.decoder, x).items():
        np.testing.assert_allclose(plain[later].second_moment, np.square(inputs).mean(0), rtol=1e-3, atol=1e-6)
    changed = "model.layers.2.self_attn.qkv_proj.weight"
    assert not np.allclose(found[changed].second_moment, whole[changed].second_moment, rtol=0.01)


def test_a_work_directory_of_something_else_is_refused(
    checkpoint: Checkpoint, data: CalibrationData, tmp_path: Path
) -> None:
    work = tmp_path / "w"
    work.mkdir()
    (work / "journal.part").touch()  # a kill before the first journal
    Calibration(checkpoint, data, work, CalibrationOptions())
    Calibration(checkpoint, data, work, CalibrationOptions(threads=2))  # changes nothing that counts
    shorter = CalibrationData(data.sequences[1:])
    for other in ((shorter, CalibrationOptions()), (data, CalibrationOptions(0.5))):
        with pytest.raises(InputError, match="another checkpoint, other data or other options"):
            Calibration(checkpoint, other[0], work, other[1])
    (work / "journal.json").write_text("{}")
    with pytest.raises(InputError, match="belongs to a calibration of another"):
        Calibration(checkpoint, data, work, CalibrationOptions())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear")
    with pytest.raises(InputError, match="neither empty nor a calibration"):
        Calibration(checkpoint, data, tmp_path / "letters", CalibrationOptions())
    with pytest.raises(InputError, match="image_token_weight is nan"):
        CalibrationOptions(float("nan"))


def test_another_checkpoint_is_noticed(checkpoint_copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = Checkpoint.open(checkpoint_copy)
    text = CalibrationData((CalibrationSequence("text", tuple(range(20))),))
    Calibration(copy, text, tmp_path / "w", CalibrationOptions()).run()
    tensors = load_file(checkpoint_copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * 1.01
    save_file(tensors, checkpoint_copy / "tuned.safetensors")
    (checkpoint_copy / "tuned.safetensors").replace(checkpoint_copy / "model.safetensors")
    with pytest.raises(InputError, match="another checkpoint"):
        Calibration(Checkpoint.open(checkpoint_copy), text, tmp_path / "w", CalibrationOptions())
    tensors["model.layers.1.mlp.down_proj.weight"][:] = np.nan
    save_file(tensors, checkpoint_copy / "model.safetensors")
    broken = Calibration(Checkpoint.open(checkpoint_copy), text, tmp_path / "x", CalibrationOptions())
    with pytest.raises(CheckpointError, match=r"the inputs of model\.layers\.2\.self_attn\.qkv_proj\.weight"):
        broken.run()


def test_a_lost_boundary_is_told(checkpoint: Checkpoint, data: CalibrationData, tmp_path: Path) -> None:
    def stop(layer: LayerInputs) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibration(checkpoint, data, tmp_path / "w", CalibrationOptions()).run(stop)
    boundary = tmp_path / "w/boundary-0.f32"
    boundary.write_bytes(boundary.read_bytes()[:-4])
    with pytest.raises(PhisightError, match="ends early"):
        Calibration(checkpoint, data, tmp_path / "w", CalibrationOptions()).run()
    boundary.unlink()
    with pytest.raises(PhisightError, match="cannot be read"):
        Calibration(checkpoint, data, tmp_path / "w", CalibrationOptions()).run()


def test_gathering_changes_no_sum() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 40)).astype(np.float32)
    weights = rng.choice([0, 0.5, 1], 3000).astype(np.float32)
    sums = GatheredSum(40, hessian=True)
    for start in range(0, 3000, 130):
        sums.add(x[start : start + 130], weights[start : start + 130])
    found = sums.finish()
    assert found.hessian is not None
    wanted = (x * weights[:, None]).T.astype(np.float64) @ x / weights.sum()
    np.testing.assert_allclose(found.hessian, wanted, atol=1e-5)
    assert found.count == weights.sum()


def test_folding_changes_nothing_but_the_rounding(
    checkpoint: Checkpoint, data: CalibrationData, model: phisight.Model, tmp_path: Path
) -> None:
    """With a float16 head and INT8 blocks: what awq keeps, dequantised, is the same model to 2 %."""
    plan = make_plan(checkpoint.config, ExportOptions(decoder="int8", head="f16", vision="f32", accuracy_level=0))
    quantized = QuantizedWeights(tmp_path / "w/quantized")
    options = CalibrationOptions(hessians=True, purpose="awq")
    Calibration(checkpoint, data, tmp_path / "w", options).run(AwqQuantizer(checkpoint, plan.schemes, quantized))
    weights = _weights(checkpoint)
    folded = dict(weights)
    for name, scheme in plan.schemes.items():
        if name in quantized:
            assert isinstance(scheme, BlockScheme)
            parts = quantized.blocks(name, weights[name].shape[1], scheme)
            folded[name] = np.concatenate([dequantize_blocks(part) for part in parts]).astype(np.float64)
        elif (vector := quantized.vector(name)) is not None:
            folded[name] = vector.astype(np.float64)
    changed = {name for name in weights if not np.allclose(folded[name], weights[name], rtol=0.05, atol=1e-2)}
    assert len([name for name in changed if name.endswith("layernorm.weight")]) >= 4
    assert any(name.endswith("qkv_proj.weight") for name in changed)
    sequence = next(each for each in data.sequences if not each.images)
    x = weights["model.embed_tokens.weight"][list(sequence.ids)]
    before, after = (_layer_inputs(each, checkpoint.config.decoder, x)["lm_head.weight"] for each in (weights, folded))
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)
