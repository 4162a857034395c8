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
from phisight.export.documents import (
    SPECIAL_TOKENS,
    config_document,
    generation_document,
    preprocessor_document,
    tokenizer_document,
)
from phisight.export.names import TensorSpec, expected_tensors
from phisight.export.parallel import Progress
from phisight.tokenizer import byte_alphabet

__all__ = ["Width", "synthesize", "synthetic_model", "synthetic_tokenizer"]

Width = Literal["tiny", "real"]

MARK = "phisight_synthetic"
"""The key of config.json by which --force knows that a checkpoint is synthetic."""

END_OF_TURN = 9
"""Place of <|im_end|> among the special tokens, which follow the ordinary vocabulary."""

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
            "config.json": config_document(model) | {MARK: {"width": width, "layers": layers, "seed": seed}},
            "generation_config.json": generation_document(model.generation),
            "preprocessor_config.json": preprocessor_document(ImageBudget()),
            "tokenizer.json": synthetic_tokenizer(model.decoder.vocab_size),
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


def synthetic_tokenizer(vocab_size: int) -> dict[str, Any]:
    """Byte-level BPE without merges: bytes as the first 256 ids, special tokens as the last.

    Ids between them are words that no text becomes (" w256", ...), since ids may not have gaps.
    """
    space = next(symbol for symbol, byte in byte_alphabet().items() if byte == ord(" "))
    symbols = [*byte_alphabet(), *(f"{space}w{id_}" for id_ in range(256, vocab_size - SPECIAL_TOKENS))]
    return tokenizer_document({symbol: i for i, symbol in enumerate(symbols)})
