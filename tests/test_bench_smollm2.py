"""The converter of bench/smollm2.py: a small Llama written as GGUF, through llama.cpp and through our export of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from phisight.errors import InputError
from phisight.gguf_file import GgufFile
from phisight.tokenizer import byte_alphabet

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "bench/smollm2.py"
    spec = importlib.util.spec_from_file_location("bench_smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q8_0 matrices, a tied head, and a vocabulary of bytes."""
    path = tmp_path_factory.mktemp("llama") / "small.gguf"
    tokens = [*CONTROL, *byte_alphabet(), "Ġt"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + 0.1 * values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values * shape[1] ** -0.5, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    kv = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        for name, rows in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv), ("attn_output", HIDDEN)):
            add(f"blk.{layer}.{name}.weight", rows, HIDDEN)
        for name, shape in (("ffn_gate", (INNER, HIDDEN)), ("ffn_up", (INNER, HIDDEN)), ("ffn_down", (HIDDEN, INNER))):
            add(f"blk.{layer}.{name}.weight", *shape)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_converted_model_is_the_same(bench: ModuleType, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source, out = GgufFile.read(llama), tmp_path / "checkpoint"
    bench.convert(source, out)
    proved = bench.prove(source, out, windows=1)
    assert proved["same_tokens"]
    exact = proved["llama.cpp, weights in F32"]
    assert exact["positions"] == 511
    assert exact["largest_difference"] < 3e-4
    assert exact["kld_mean"] < 1e-8
    assert exact["same_top1"] > 0.99


def test_rows_go_where_the_rotation_wants_them(bench: ModuleType) -> None:
    """Two heads of width 6: neighbours 0 1, 2 3, 4 5 become halves 0 3, 1 4, 2 5."""
    rows = np.repeat(np.arange(12, dtype=np.float32)[:, None], 3, axis=1)
    assert bench.unpermute(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_another_architecture_is_refused(bench: ModuleType, llama: Path, tmp_path: Path) -> None:
    source = GgufFile.read(llama)
    source.metadata["general.architecture"] = "gemma"
    with pytest.raises(InputError, match=r"architecture 'gemma', wanted 'llama'"):
        bench.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
