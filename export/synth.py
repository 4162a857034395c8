"""Synthetic checkpoints: random weights under the real names, at the real or at small widths, of any depth.

They open, export and run as the real one does, so that sizes, times and memory can be tried without a download. What
such a model says has no meaning.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig, read_json
from phisight.errors import ConfigError, InputError
from phisight.export.checkpoint import INDEX, Checkpoint, import_safetensors
from phisight.export.directory import check_place, new_directory
from phisight.export.names import TensorSpec, expected_tensors
from phisight.export.parallel import Progress
from phisight.tokenizer import byte_alphabet

__all__ = ["Width", "synthesize", "synthetic_model"]

Width = Literal["tiny", "real"]

MARK = "phisight_synthetic"
"""The key of config.json by which --force knows that a checkpoint is synthetic."""

SPECIAL_TOKENS = 96
DUMMIES = 86
END_OF_TURN = 9
"""Place of <|im_end|> among the special tokens, which follow the ordinary vocabulary."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where cl100k splits text: https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py"""

ELEMENTS_AT_ONCE = 4 << 20
SHARD_BYTES: dict[Width, int] = {"tiny": 1 << 20, "real": 4 << 30}


@dataclass(frozen=True)
class Shard:
    """One safetensors file and the tensors in it, in order."""

    name: str
    specs: tuple[TensorSpec, ...]


def synthetic_model(width: Width, layers: int) -> ModelConfig:
    """The configuration: `layers` decoder layers and one vision layer more, since the last is never used.

    Raises InputError.
    """
    if width not in get_args(Width):
        raise InputError(f"width is {width!r}, wanted one of {', '.join(get_args(Width))}")
    if layers < 1:
        raise InputError(f"layers is {layers}, wanted at least 1")
    if width == "real":
        decoder = DecoderConfig(5120, 17920, layers, 40, 10, 100352, 32768, 500000.0, 1e-5)
        vision = VisionConfig(1152, 4304, layers + 1, 16)
    else:
        decoder = DecoderConfig(128, 256, layers, 4, 2, 352, 32768, 500000.0, 1e-5)
        vision = VisionConfig(64, 128, layers + 1, 4)
    end = decoder.vocab_size - SPECIAL_TOKENS + END_OF_TURN
    return ModelConfig(decoder, vision, ImageBudget(), GenerationDefaults((end,)))


def synthesize(
    out: Path,
    *,
    layers: int,
    width: Width,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda weights: None,
) -> Checkpoint:
    """Write a BF16 checkpoint in shards; the same seed gives the same weights, whatever the depth.

    A few slices of 16 MiB are held in memory. `force` replaces only a synthetic checkpoint or an empty directory.
    Raises InputError, or PhisightError for a disk that is full; `out` is then as it was.
    """
    model = synthetic_model(width, layers)
    if seed < 0:
        raise InputError(f"seed is {seed}, wanted 0 or more")
    shards = _shards(list(expected_tensors(model).values()), SHARD_BYTES[width])
    total = sum(_nbytes(spec) for shard in shards for spec in shard.specs)
    import_safetensors()
    check_place(out, total, kind="a synthetic checkpoint", ours=_is_synthetic, force=force)
    with new_directory(out) as work:
        for shard in shards:
            with (work / shard.name).open("wb") as file:
                _write_shard(file, shard, seed, progress)
        weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
        documents = {
            INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map},
            "config.json": _config(model) | {MARK: {"width": width, "layers": layers, "seed": seed}},
            "generation_config.json": _generation_config(model.generation),
            "preprocessor_config.json": _preprocessor_config(),
            "tokenizer.json": _tokenizer(model.decoder.vocab_size),
        }
        for name, document in documents.items():
            text = json.dumps(document, indent=1, ensure_ascii=False)
            (work / name).write_text(text + "\n", encoding="utf-8", newline="\n")
    return Checkpoint.open(out)


def _is_synthetic(directory: Path) -> bool:
    try:
        return MARK in read_json(directory / "config.json")
    except ConfigError:
        return False


def _nbytes(spec: TensorSpec) -> int:
    return 2 * spec.size


def _shards(specs: list[TensorSpec], most: int) -> list[Shard]:
    """Tensors in order, as many to a file as stay within `most` bytes, but at least one."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + _nbytes(spec) > most:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += _nbytes(spec)
    count = len(groups)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def _write_shard(file: BinaryIO, shard: Shard, seed: int, progress: Progress) -> None:
    """Length of the header (8 bytes), header in JSON, data: https://github.com/huggingface/safetensors#format"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in shard.specs:
        start, end = end, end + _nbytes(spec)
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in shard.specs:
        for part in _values(spec, seed):
            file.write(_bfloat16(part).data.cast("B"))
            progress(part.size)


def _values(spec: TensorSpec, seed: int) -> Iterator[NDArray[np.float32]]:
    """A tensor's values, in slices, from a stream of its own.

    A matrix keeps the size of what it is given, norms are about 1, biases and embeddings about 0.
    """
    matrix = len(spec.shape) == 2 and "embed" not in spec.name
    spread = np.float32(spec.shape[1] ** -0.5 if matrix else 0.02)
    centre = np.float32(1 if "norm" in spec.name and spec.name.endswith("weight") else 0)
    random = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    left = spec.size
    while left:
        part = random.standard_normal(min(left, ELEMENTS_AT_ONCE), np.float32)
        part *= spread
        part += centre
        yield part
        left -= part.size


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, halves to even."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return (rounded >> 16).astype("<u2")


def _config(model: ModelConfig) -> dict[str, Any]:
    decoder, vision = model.decoder, model.vision
    assert vision is not None
    return {
        "architectures": ["Phi4ForCausalLMV"],
        "model_type": "phi4-siglip",
        "dtype": "bfloat16",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.context_length,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": decoder.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "eos_token_id": model.generation.eos_token_ids[0],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.hidden_size,
        "use_mm_proj": True,
        "use_s2": False,
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
        },
    }


def _generation_config(generation: GenerationDefaults) -> dict[str, Any]:
    return {
        "eos_token_id": list(generation.eos_token_ids),
        "do_sample": True,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
    }


def _preprocessor_config() -> dict[str, Any]:
    budget = ImageBudget()
    return {
        "min_num_patches": budget.min_patches,
        "max_num_patches": budget.max_patches,
        "patch_size": 16,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """Byte-level BPE without merges: bytes as the first 256 ids, special tokens as the last.

    Ids between them are words that no text becomes (" w256", ...), since ids may not have gaps.
    """
    ordinary = vocab_size - SPECIAL_TOKENS
    space = next(symbol for symbol, byte in byte_alphabet().items() if byte == ord(" "))
    symbols = [*byte_alphabet(), *(f"{space}w{id_}" for id_ in range(256, ordinary))]
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": ordinary + i, "content": name, **flags, "special": not name.endswith("think>")}
            for i, name in enumerate(_special_tokens())
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": []},
    }


def _special_tokens() -> list[str]:
    """Phi-4's special tokens in the order of their ids, 100256 to 100351 in the real tokenizer."""
    dummies = [f"<|dummy_{i}|>" for i in range(DUMMIES)]
    middle = [f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix")]
    turns = ["<|im_start|>", "<|im_end|>", "<|im_sep|>"]
    return [
        dummies[0],
        "<|endoftext|>",
        *middle,
        *dummies[1:4],
        *turns,
        *dummies[4:13],
        "<|endofprompt|>",
        *dummies[13:],
        "<think>",
        "</think>",
    ]
