"""GGUF files: equal to llama.cpp's own where they must be, equal to the ONNX export where they can be."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import phisight
from phisight.backends.llamacpp_library import import_llama_cpp
from phisight.errors import EngineError, InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, plan_gguf
from phisight.export.gguf_plan import GgufOptions
from phisight.export.gguf_types import PRESETS, fitting_type, preset_type
from phisight.export.names import expected_tensors, gguf_name
from phisight.manifest import Manifest
from phisight.quant import ggml
from phisight.quant.packing import unpack_matmul_nbits, unpack_q4_0, unpack_q8_0
from phisight.tokenizer import Tokenizer

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"

# SHA-256 over name, type, shape and bytes of every tensor, in order, of the files that llama.cpp's converter
# (convert_hf_to_gguf.py of the llama.cpp in llama-cpp-python 0.3.36; --outtype, and --mmproj) made of the tiny golden
# model. Its tokenizer class was set to GPT2Tokenizer, as in the real checkpoint, and the converter's recognition of the
# pre-tokenizer, which knows whole vocabularies only, was overridden to dbrx.
CONVERTED = {
    ("text", "F16"): "297ccec81aebc71ac89b2ad448ae916b6ce438818eb57902ea54eefd515a4e40",
    ("text", "BF16"): "90a1d4d171260b483bb5c0ae15e5ff06711f233e3c098b865cefeacf5612b36e",
    ("text", "F32"): "88b38d43c9d546e6bed125d7cf59c110f7e6b2ee4b1e576437670c777fe900a3",
    ("mmproj", "F16"): "7b283f8a59c98262842a7d31db4dea70e82c3bd8edef0a0527af03801603c09d",
    ("mmproj", "F32"): "4dc237de1627032430a491e197b82ae65e38f10ec2ac079e831077753d91ce80",
}

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports of a checkpoint, each made once."""
    made: dict[Any, Path] = {}

    def make(checkpoint: Path, **options: Any) -> Path:
        key = (checkpoint, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "model"
            source = Checkpoint.open(checkpoint)
            export_gguf(source, plan_gguf(source, GgufOptions(**options)), made[key])
        return made[key]

    return make


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).fields.get(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize(("file", "type_name"), CONVERTED)
def test_every_tensor_equals_the_converters(file: str, type_name: str, export: Export, golden: Path) -> None:
    vision = type_name if type_name != "BF16" else "F32"
    directory = export(golden / "tiny_model", decoder=type_name, vision=vision, onnx_vision="none")
    path = directory / (f"model-{type_name.lower()}.gguf" if file == "text" else f"mmproj-{type_name.lower()}.gguf")
    digest = hashlib.sha256()
    for tensor in tensors(path).values():
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {[int(x) for x in tensor.shape]}\n".encode())
        digest.update(tensor.data.tobytes())
    assert digest.hexdigest() == CONVERTED[file, type_name]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("F32", "F16", "BF16", "Q8_0", "Q4_0")])
def test_types_and_bytes_are_those_of_llama_cpps_quantiser(preset: str, export: Export, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    source = export(DEMO, decoder="F32", onnx_vision="none") / "model-f32.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[PRESETS[preset][1]].value
    params.nthread = 2
    stock = tmp_path / "stock.gguf"
    import_llama_cpp()  # silences its log; a callback of our own would have to outlive every later call
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(stock).encode(), params) == 0
    ours, theirs = (
        tensors(file)
        for file in (export(DEMO, decoder=preset, onnx_vision="none") / f"model-{preset.lower()}.gguf", stock)
    )
    types = ({name: tensor.tensor_type.name for name, tensor in file.items()} for file in (ours, theirs))
    assert next(types) == next(types)
    assert [name for name in ours if ours[name].data.tobytes() != theirs[name].data.tobytes()] == []


@pytest.mark.parametrize("layers", [3, 8, 40])
def test_layers_with_more_bits_at_other_depths(layers: int) -> None:
    # llama.cpp: the first and last eighth, and every third of those between, counted from the first eighth.
    def down(layer: int) -> str:
        return preset_type("Q4_K_M", f"blk.{layer}.ffn_down.weight", layers=layers, groups=4)

    more = [layer for layer in range(layers) if down(layer) == "Q6_K"]
    by_hand = {3: [2], 8: [0, 3, 6, 7], 40: [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39]}
    assert more == by_hand[layers]


@pytest.mark.parametrize(("decoder", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_blocks_are_the_onnx_exports_own(
    decoder: str, bits: int, export: Export, exported: Callable[..., Path]
) -> None:
    in_gguf = tensors(export(DEMO, decoder=decoder, onnx_vision="none") / f"model-{decoder.lower()}.gguf")
    directory = exported(DEMO, decoder=f"int{bits}", head="int8")
    graph = onnx.load(directory / "decoder.onnx")
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    compared = 0
    for name in expected_tensors(Checkpoint.open(DEMO).config):
        packed = weights.get(f"{name}.packed")
        if packed is None or (decoder == "Q4_0" and name == "lm_head.weight"):
            continue
        q = unpack_matmul_nbits(packed, bits)
        data = in_gguf[gguf_name(name)].data
        blocks = unpack_q4_0(data) if bits == 4 else unpack_q8_0(data)
        np.testing.assert_array_equal(blocks.q, q)
        np.testing.assert_array_equal(blocks.scale, weights[f"{name}.scales"])
        compared += 1
    assert compared == (16 if bits == 4 else 17)


# RMS error of a type relative to the tensor's RMS, at most: about 1.3 times what normal weights give.
ERRORS = {
    "BF16": 0.0025, "F16": 0.0003, "Q8_0": 0.008, "Q6_K": 0.025, "Q5_1": 0.05, "Q5_0": 0.06, "Q5_K": 0.05,
    "Q4_1": 0.11, "Q4_0": 0.12, "Q4_K": 0.1, "IQ4_NL": 0.11, "IQ4_XS": 0.11, "Q3_K": 0.21, "IQ3_S": 0.22, "Q2_K": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "F32"])
def test_every_type_comes_back(preset: str, export: Export) -> None:
    if preset not in ("F16", "BF16", "Q4_0", "Q8_0"):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    source = Checkpoint.open(DEMO)
    stored = tensors(export(DEMO, decoder=preset, onnx_vision="none") / f"model-{preset.lower()}.gguf")
    seen = set()
    for name, tensor in source.tensors.items():
        if tensor.spec.part not in ("decoder", "head", "embeddings") or len(tensor.shape) == 1:
            continue
        entry = stored[gguf_name(name)]
        type_name = entry.tensor_type.name
        weights: NDArray[np.float32] = tensor.load()
        back = gguf.dequantize(entry.data, entry.tensor_type).reshape(weights.shape)
        rms = float(np.sqrt(np.mean(np.square(back - weights))) / np.sqrt(np.mean(np.square(weights))))
        assert rms < ERRORS[type_name], (name, type_name, rms)
        seen.add(type_name)
    assert PRESETS[preset][0] in seen


def test_rows_that_fit_no_block(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert fitting_type("Q8_0", 4304) == "F16"
    assert fitting_type("Q4_K", 4304) == "F16"
    assert fitting_type("Q4_K", 128) == "Q5_0"
    assert fitting_type("IQ4_XS", 96) == "IQ4_NL"
    assert fitting_type("Q6_K", 1152) == "Q8_0"
    assert fitting_type("Q4_K", 5120) == "Q4_K"


def test_metadata_of_the_text_file(export: Export, golden: Path) -> None:
    file = export(golden / "tiny_model", decoder="F16", onnx_vision="none") / "model-f16.gguf"
    wanted = {
        "general.architecture": "phi3",
        "phi3.context_length": 32768,
        "phi3.rope.scaling.original_context_length": 32768,
        "phi3.embedding_length": 128,
        "phi3.feed_forward_length": 256,
        "phi3.block_count": 4,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.rope.dimension_count": 32,
        "phi3.rope.freq_base": 500000.0,
        "phi3.attention.sliding_window": 0,
        "general.file_type": 1,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 265,
        "tokenizer.ggml.padding_token_id": 349,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["\u00c0 \u00c1"],
        "tokenizer.chat_template": None,
    }
    assert {key: field(file, key) for key in wanted} == wanted
    assert field(file, "phi3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    tokens, types = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 352
    assert (tokens[265], types[265]) == ("<|im_end|>", gguf.TokenType.CONTROL)
    assert (tokens[350], types[350]) == ("<think>", gguf.TokenType.USER_DEFINED)
    assert types[:256] == [gguf.TokenType.NORMAL] * 256
    assert field(file, "phisight.tokenizer.lstrip") == list(range(256, 352))


def test_metadata_of_the_mmproj(export: Export, golden: Path) -> None:
    file = export(golden / "tiny_model", decoder="F16", onnx_vision="none") / "mmproj-f16.gguf"
    wanted = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "phi4",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": 128,
        "clip.vision.image_size": 256,
        "clip.vision.patch_size": 16,
        "clip.vision.embedding_length": 64,
        "clip.vision.feed_forward_length": 128,
        "clip.vision.block_count": 3,
        "clip.vision.attention.head_count": 4,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
        "clip.vision.image_min_pixels": 256,
        "clip.vision.image_max_pixels": 3600 * 256,
        "phisight.image.min_patches": 256,
        "phisight.image.max_patches": 3600,
    }
    assert {key: field(file, key) for key in wanted} == wanted


def test_the_directory(export: Export) -> None:
    directory = export(DEMO, decoder="Q4_0")
    names = {path.name for path in directory.iterdir()}
    assert {"model-q4_0.gguf", "mmproj-f16.gguf", "vision.onnx", "vision.onnx.data", "Modelfile"} <= names
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    assert manifest.format == "gguf"
    assert manifest.options == {"decoder": "q4_0", "vision": "f16", "onnx_vision": "w8a8"}
    assert manifest.tensors["lm_head.weight"].scheme == "q6_k"
    assert (directory / "Modelfile").read_text().startswith("FROM ./model-q4_0.gguf\nFROM ./mmproj-f16.gguf\n")
    assert manifest.files["model-q4_0.gguf"].bytes % 32 == 0


def test_a_text_only_checkpoint_has_no_mmproj(golden: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    text = tmp_path / "text"
    shutil.copytree(golden / "tiny_model", text, copy_function=shutil.copyfile)
    config = json.loads((text / "config.json").read_text())
    config |= {"architectures": ["Phi3ForCausalLM"]}
    (text / "config.json").write_text(json.dumps(config))
    kept = {n: w for n, w in load_file(text / "model.safetensors").items() if "vision" not in n and "mm_" not in n}
    save_file(kept, text / "model.safetensors")
    checkpoint = Checkpoint.open(text)
    export_gguf(checkpoint, plan_gguf(checkpoint, GgufOptions(decoder="F16")), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model-f16.gguf" in names
    assert not any(name.startswith(("mmproj", "vision")) for name in names)


def test_single_tensors_by_plan() -> None:
    checkpoint = Checkpoint.open(DEMO)
    plan = plan_gguf(checkpoint, GgufOptions(overrides=(("blk.1.ffn_up.weight", "Q8_0"), ("mm.2.weight", "Q8_0"))))
    types = {tensor.name: tensor.type for tensor in (*plan.text, *plan.vision)}
    assert (types["blk.1.ffn_up.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    assert types["mm.2.weight"] == "Q8_0"
    for overrides, words in [
        ({"blk.9.ffn_up.weight": "Q8_0"}, "does not have: blk.9.ffn_up.weight"),
        ({"blk.1.ffn_up.weight": "Q9"}, "'Q9' is no ggml type for weights, wanted one of F32, F16"),
        ({"blk.1.attn_norm.weight": "Q8_0"}, "no matrix"),
        ({"v.blk.0.attn_q.weight": "Q4_K"}, "192 are no multiple of Q4_K's block of 256"),
    ]:
        with pytest.raises(InputError, match=words):
            plan_gguf(checkpoint, GgufOptions(overrides=tuple(overrides.items())))
    with pytest.raises(InputError, match="decoder is 'Q9'"):
        GgufOptions(decoder="Q9")


def test_without_ggml_only_its_own_types_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    ggml._library.cache_clear()
    checkpoint = Checkpoint.open(DEMO)
    plan_gguf(checkpoint, GgufOptions(decoder="Q8_0"))
    with pytest.raises(EngineError, match=r"phisight\[gguf\]"):
        plan_gguf(checkpoint, GgufOptions(decoder="Q4_K_M"))
    ggml._library.cache_clear()


@pytest.mark.parametrize("preset", PRESETS)
def test_stock_llama_cpp_opens_and_evaluates_every_type(preset: str, export: Export) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    file = export(DEMO, decoder=preset, onnx_vision="none") / f"model-{preset.lower()}.gguf"
    model = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    text = b"<|im_start|>user<|im_sep|>What is 3 + 4?<|im_end|><|im_start|>assistant<|im_sep|>"
    ids = model.tokenize(text, add_bos=False, special=True)
    assert ids == Tokenizer.from_file(DEMO / "tokenizer.json").encode(text.decode(), parse_special=True)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    assert np.isfinite(logits).all()
    assert logits.std() > 0.5
    model.close()
