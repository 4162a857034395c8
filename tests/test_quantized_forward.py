"""Quantised exports against a plain NumPy forward over the weights that the exported files hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

import phisight
from phisight.backends.ort_session import SessionSettings, integer_products, open_session
from phisight.config import DecoderConfig, VisionConfig
from phisight.errors import ImageError
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import expected_tensors
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_layers import LayerBuilder
from phisight.export.onnx_writer import write_graph
from phisight.export.output import OutputDirectory
from phisight.export.plan import ExportOptions, make_plan
from phisight.manifest import Manifest
from phisight.quant.packing import unpack_matmul_nbits

Exporter = Callable[..., Path]
Array = NDArray[np.float64]

TOWER = "model.vision_tower.vision_tower.vision_model."


class Weights:
    """Every tensor of an exported directory, dequantised, under its checkpoint name. Linear layers are `x @ w.T`."""

    def __init__(self, directory: Path) -> None:
        manifest = Manifest.read(directory)
        shapes = {name: spec.shape for name, spec in expected_tensors(manifest.model).items()}
        stored: dict[str, NDArray[Any]] = {}
        for graph in directory.glob("*.onnx"):
            stored |= _external_tensors(graph)
        self.values: dict[str, Array] = {}
        for name, array in stored.items():
            tensor = name.removesuffix(".packed").removesuffix(".int8")
            if tensor not in shapes:  # scales, rotation tables
                continue
            if name.endswith(".packed"):
                scales = stored[tensor + ".scales"].astype(np.float64)
                bits = {"int4": 4, "int8": 8}[manifest.tensors[tensor].scheme.split()[0]]
                rows = unpack_matmul_nbits(array, bits) * scales[..., None]
                value = rows.reshape(len(rows), -1)[:, : shapes[tensor][1]]
            elif name.endswith(".int8"):
                value = (array * stored[tensor + ".scale"].astype(np.float64)).T
            else:
                value = array.astype(np.float64)
                if value.ndim == 2 and not tensor.endswith("position_embedding.weight"):
                    value = value.T
            assert value.shape == shapes[tensor]
            self.values[tensor] = value
        table = np.load(directory / "embeddings.npy").astype(np.float64)
        if (directory / "embeddings.scales.npy").exists():
            table *= np.repeat(np.load(directory / "embeddings.scales.npy").astype(np.float64), 32, axis=1)
        self.values["model.embed_tokens.weight"] = table

    def __getitem__(self, name: str) -> Array:
        return self.values[name]


def _external_tensors(graph: Path) -> dict[str, NDArray[Any]]:
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        data = (graph.parent / place["location"]).read_bytes()
        part = data[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
        found[tensor.name] = np.frombuffer(part, dtype).reshape(tuple(tensor.dims))
    return found


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normalized: Array = weights / weights.sum(axis=-1, keepdims=True)
    return normalized


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


def decoder_logits(weights: Weights, config: DecoderConfig, ids: list[int]) -> Array:
    """Phi-3: (n,) ids -> (n, vocab)."""
    x = weights["model.embed_tokens.weight"][ids]
    n, size, half = len(ids), config.head_dim, config.head_dim // 2
    angle = np.arange(n)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    future = np.triu(np.ones((n, n), bool), 1)

    def rotate(heads: Array) -> Array:
        first, second = heads[..., :half], heads[..., half:]
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        normed = _rms_norm(x, weights[layer + "input_layernorm.weight"], config.rms_norm_eps)
        heads = (normed @ weights[layer + "self_attn.qkv_proj.weight"].T).reshape(n, -1, size)
        q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
        q, k = rotate(q), rotate(k)
        mixed = np.empty_like(q)
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(size)
            scores[future] = -np.inf
            mixed[:, head] = _softmax(scores) @ v[:, shared]
        x = x + mixed.reshape(n, -1) @ weights[layer + "self_attn.o_proj.weight"].T
        normed = _rms_norm(x, weights[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = np.split(normed @ weights[layer + "mlp.gate_up_proj.weight"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[layer + "mlp.down_proj.weight"].T
    logits: Array = _rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T
    return logits


def image_features(weights: Weights, config: VisionConfig, pixels: NDArray[np.float32]) -> Array:
    """SigLIP2 up to the layer before the last and the projector, for a grid of 16 x 16: (256, 768) -> (256, hidden)."""

    def linear(x: Array, name: str) -> Array:
        y: Array = x @ weights[name + ".weight"].T + weights[name + ".bias"]
        return y

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
        y: Array = scaled * weights[name + ".weight"] + weights[name + ".bias"]
        return y

    x = linear(pixels.astype(np.float64), TOWER + "embeddings.patch_embedding")
    x = x + weights[TOWER + "embeddings.position_embedding.weight"]
    size = config.hidden_size // config.num_heads
    for i in range(config.num_layers - 1):
        layer = f"{TOWER}encoder.layers.{i}."
        normed = norm(x, layer + "layer_norm1")
        q, k, v = (
            linear(normed, f"{layer}self_attn.{name}_proj").reshape(len(x), -1, size).swapaxes(0, 1) for name in "qkv"
        )
        mixed = _softmax(q @ k.swapaxes(1, 2) / np.sqrt(size)) @ v
        x = x + linear(mixed.swapaxes(0, 1).reshape(len(x), -1), layer + "self_attn.out_proj")
        inner = linear(norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, layer + "mlp.fc2")
    x = linear(x, "model.mm_projector.0")
    x = 0.5 * x * (1 + _erf(x / np.sqrt(2)))
    return linear(x, "model.mm_projector.2")


def _erf(x: Array) -> Array:
    values: Array = np.vectorize(math.erf)(x)
    return values


@pytest.fixture(scope="module")
def text_ids(golden: Path) -> list[int]:
    with np.load(golden / "tiny_golden/text_only.npz") as file:
        ids: list[int] = file["input_ids"].tolist()
    return ids


@pytest.fixture(scope="module")
def square(synthetic_image: Callable[..., Image.Image]) -> phisight.Patches:
    """16 x 16 patches: the position table as it is."""
    return phisight.preprocess(synthetic_image("RGB", 250, 250, 0))


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Root mean square of the difference over that of the wanted values."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_numpy_forward_is_the_model(
    golden: Path, tiny_checkpoint: Path, exported: Exporter, text_ids: list[int], square: phisight.Patches
) -> None:
    """On float32 weights it gives the reference's numbers, so that it may judge the quantised ones."""
    directory = exported(tiny_checkpoint, decoder="f32")
    weights, model = Weights(directory), Manifest.read(directory).model
    assert model.vision is not None
    with np.load(golden / "tiny_golden/text_only.npz") as file:
        logits = decoder_logits(weights, model.decoder, text_ids)
        np.testing.assert_allclose(logits, file["logits_all"], rtol=0, atol=1e-4)
    with np.load(golden / "tiny_golden/img_250x250.npz") as file:
        features = image_features(weights, model.vision, square.pixel_values)
        np.testing.assert_allclose(features, file["img0/projected"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "head"), [("int4", None), ("int8", None), ("int4", "int4"), ("int8", "f16")])
def test_decoder(
    tiny_checkpoint: Path, exported: Exporter, text_ids: list[int], bits: str, head: str | None, size: int
) -> None:
    directory = exported(tiny_checkpoint, decoder=bits, head=head, block_size=size, vision="f32")
    weights, manifest = Weights(directory), Manifest.read(directory)
    wanted = decoder_logits(weights, manifest.model.decoder, text_ids)
    exact = phisight.load(directory, threads=2, accuracy_level=0).score(text_ids)
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=1e-4)
    # Level 4 rounds activations to INT8 block by block. Here that costs 2.5 to 3.6 %, the more the larger the block.
    fast = phisight.load(directory, threads=2, accuracy_level=4).score(text_ids)
    assert 0.01 < _relative(fast, wanted) < 0.05
    np.testing.assert_array_equal(phisight.load(directory, threads=2).score(text_ids), fast)  # as exported


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "most"), [("int4", 0.11), ("int8", 0.007)])
def test_stored_weights_are_the_checkpoints(
    tiny_checkpoint: Path, exported: Exporter, bits: str, most: float, size: int
) -> None:
    """Normally distributed weights lose 8.5 % to 10.5 % in four bits and a sixteenth of that in eight."""
    original = Checkpoint.open(tiny_checkpoint)
    weights = Weights(exported(tiny_checkpoint, decoder=bits, block_size=size, vision="int8"))
    assert weights.values.keys() | set(original.unused) == original.tensors.keys()
    for name, value in weights.values.items():
        tensor = original.tensors[name]
        in_eight_bits = tensor.spec.part != "decoder"
        if value.ndim == 1 or "patch_embedding" in name or "position_embedding" in name:
            np.testing.assert_array_equal(value, tensor.load())
        else:
            assert 0 < _relative(value, tensor.load()) < (0.007 if in_eight_bits else most), name


@pytest.mark.parametrize(
    ("vision", "level", "most"),
    [("f32", 0, 5e-6), ("f16", 0, 5e-6), ("int8", 0, 5e-6), ("int8", 4, 0.025), ("w8a8", 0, 0.03)],
)
def test_vision(
    tiny_checkpoint: Path,
    exported: Exporter,
    square: phisight.Patches,
    vision: str,
    level: Literal[0, 4],
    most: float,
) -> None:
    """Against its own weights: exact, or with the rounding of activations, which costs 1.3 % (int8), 1.5 % (w8a8)."""
    directory = exported(tiny_checkpoint, decoder="int8", vision=vision)
    config = Manifest.read(directory).model.vision
    assert config is not None
    features = phisight.load(directory, threads=2, accuracy_level=level).encode_image(square)
    wanted = image_features(Weights(directory), config, square.pixel_values)
    assert _relative(features, wanted) < most
    if most > 0.01:  # the rounding really takes place
        assert _relative(features, wanted) > 0.005


@pytest.mark.parametrize(("vision", "most"), [("f16", 0.001), ("int8", 0.025), ("w8a8", 0.03)])
def test_vision_against_the_reference(
    golden: Path, tiny_checkpoint: Path, exported: Exporter, square: phisight.Patches, vision: str, most: float
) -> None:
    directory = exported(tiny_checkpoint, decoder="int8", vision=vision)
    with np.load(golden / "tiny_golden/img_250x250.npz") as file:
        assert _relative(phisight.load(directory, threads=2).encode_image(square), file["img0/projected"]) < most


@pytest.fixture
def uneven_checkpoint(checkpoint_copy: Path) -> Path:
    """A tower whose FFN of 72 is not a multiple of a block, as 4304 in the real one."""
    tensors = load_file(checkpoint_copy / "model.safetensors")
    for name, value in tensors.items():
        if "mlp.fc1" in name and name.startswith(TOWER):
            tensors[name] = value[:72].copy()
        elif name.endswith("mlp.fc2.weight") and name.startswith(TOWER):
            tensors[name] = value[:, :72].copy()
    save_file(tensors, checkpoint_copy / "model.safetensors")
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 72
    (checkpoint_copy / "config.json").write_text(json.dumps(config))
    return checkpoint_copy


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rows_that_do_not_fill_their_blocks(
    uneven_checkpoint: Path, exported: Exporter, square: phisight.Patches, size: int
) -> None:
    directory = exported(uneven_checkpoint, decoder="int4", vision="int8", block_size=size)
    manifest = Manifest.read(directory)
    assert manifest.model.vision is not None
    fc2 = manifest.tensors[TOWER + "encoder.layers.0.mlp.fc2.weight"]
    assert (fc2.weights, fc2.bytes) == (64 * 72, 64 * -(-72 // size) * (size + 2))
    wanted = image_features(Weights(directory), manifest.model.vision, square.pixel_values)
    exact = phisight.load(directory, threads=2, accuracy_level=0).encode_image(square)
    assert _relative(exact, wanted) < 5e-6
    assert _relative(phisight.load(directory, threads=2).encode_image(square), wanted) < 0.03


def test_uneven_rows_with_integer_products(
    uneven_checkpoint: Path, exported: Exporter, square: phisight.Patches
) -> None:
    directory = exported(uneven_checkpoint, decoder="int4", vision="w8a8")
    config = Manifest.read(directory).model.vision
    assert config is not None
    wanted = image_features(Weights(directory), config, square.pixel_values)
    assert _relative(phisight.load(directory, threads=2).encode_image(square), wanted) < 0.03


def test_integer_products_row_by_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each row has its own step: one with an outlier or only zeros leaves the others as they are."""
    name = TOWER + "encoder.layers.0.mlp.fc1"
    checkpoint = Checkpoint.open(tiny_checkpoint)
    graph = GraphBuilder("layer", "layer.onnx.data")
    plan = make_plan(checkpoint.config, ExportOptions(vision="w8a8"))
    layers = LayerBuilder(graph, plan, "f32")
    y = layers.linear(graph.input("x", "float32", ["rows", 64]), name, bias=True)
    graph.output(y, "float32", ["rows", 128])
    write_graph(graph, layers.jobs, checkpoint, OutputDirectory(tmp_path), lambda weights: None)
    session = open_session(tmp_path / "layer.onnx", SessionSettings(products=integer_products()))

    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    x[1, 7] = 1e4
    x[2] = 0
    x[3] *= 1e-6
    found = session.run(None, {"x": x})[0]

    stored = _external_tensors(tmp_path / "layer.onnx")
    weight = stored[name + ".weight.int8"].astype(np.float64) * stored[name + ".weight.scale"]
    bias = stored[name + ".bias"]
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)).astype(np.float64) / 127
    np.testing.assert_allclose(found, np.rint(x / step) * step @ weight + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[2], bias)
    np.testing.assert_array_equal(session.run(None, {"x": x[[0, 4]]})[0], found[[0, 4]])
    original = checkpoint.tensors
    exact = x @ original[name + ".weight"].load().T + original[name + ".bias"].load()
    assert _relative(found[[0, 4]] - bias, exact[[0, 4]] - bias) < 0.02
    assert _relative(found[3] - bias, exact[3] - bias) < 0.02


def test_a_float16_graph_on_the_cpu(
    tiny_checkpoint: Path, exported: Exporter, text_ids: list[int], square: phisight.Patches
) -> None:
    """Cache, norms and attention in half precision: 11 bits, 0.16 % here."""
    directory = exported(tiny_checkpoint, decoder="int4", float_type="f16")
    manifest, weights = Manifest.read(directory), Weights(directory)
    assert manifest.options["vision"] == "f16"
    assert manifest.model.vision is not None
    model = phisight.load(directory, threads=2, device="cpu", accuracy_level=0)
    wanted = decoder_logits(weights, manifest.model.decoder, text_ids)
    assert 1e-5 < _relative(model.score(text_ids), wanted) < 0.005
    features = image_features(weights, manifest.model.vision, square.pixel_values)
    assert _relative(model.encode_image(square), features) < 0.005
    assert model.encode_image(square).dtype == np.float32


@pytest.fixture
def text_only_checkpoint(checkpoint_copy: Path) -> Path:
    """The small model's decoder alone."""
    tensors = load_file(checkpoint_copy / "model.safetensors")
    text = {name: value for name, value in tensors.items() if "vision" not in name and "mm_projector" not in name}
    assert 0 < len(text) < len(tensors)
    save_file(text, checkpoint_copy / "model.safetensors")
    config = json.loads((checkpoint_copy / "config.json").read_text())
    kept = {key: value for key, value in config.items() if "vision" not in key and not key.startswith("mm_")}
    (checkpoint_copy / "config.json").write_text(json.dumps(kept | {"architectures": ["Phi3ForCausalLM"]}))
    (checkpoint_copy / "preprocessor_config.json").unlink()
    return checkpoint_copy


def test_a_text_only_checkpoint(
    golden: Path, text_only_checkpoint: Path, exported: Exporter, text_ids: list[int], square: phisight.Patches
) -> None:
    directory = exported(text_only_checkpoint, decoder="f32")
    assert not list(directory.glob("vision*"))
    assert not [entry for entry in Manifest.read(directory).tensors.values() if entry.part in ("vision", "projector")]
    model = phisight.load(directory, threads=2)
    with np.load(golden / "tiny_golden/text_only.npz") as file:
        np.testing.assert_allclose(model.score(text_ids), file["logits_all"], rtol=0, atol=3e-4)
    answer = model.generate("What is 1+1?", options=model.options(temperature=0, max_tokens=8))
    assert answer.stats.generated_tokens == 8
    for images in ([Image.new("RGB", (8, 8))], [square]):
        with pytest.raises(ImageError, match="cannot take images"):
            model.generate("What is this?", images)
    with pytest.raises(ImageError, match="text-only checkpoint"):
        model.generate_tokens([-200], [square])
