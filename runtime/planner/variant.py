"""A way to store a model: what its files weigh and how each part is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phisight.config import ModelConfig
from phisight.manifest import TensorEntry

__all__ = ["Variant"]

ONNX_TOWER = {"onnx": ("vision", "projector"), "gguf": ("onnx_vision",)}
"""Parts of the tower that ONNX Runtime runs."""


@dataclass(frozen=True)
class Variant:
    """`files` are sizes in bytes by name, `tensors` as a manifest has them. `command` makes it.

    `decoder`, `head` and `tower` name the rates that apply to them. `int8_kv`: the KV cache is kept as INT8.
    """

    name: str
    format: Literal["onnx", "gguf"]
    config: ModelConfig
    files: Mapping[str, int]
    tensors: Mapping[str, TensorEntry]
    decoder: str
    head: str
    tower: str
    command: str
    int8_kv: bool = False

    @property
    def file_bytes(self) -> int:
        """On disk."""
        return sum(self.files.values())

    @property
    def layer_bytes(self) -> int:
        """Of the layers, which a decoding step reads."""
        return sum(entry.bytes for entry in self.tensors.values() if entry.part == "decoder")

    @property
    def head_bytes(self) -> int:
        """Of the head, which it reads too."""
        return sum(entry.bytes for entry in self.tensors.values() if entry.part == "head")

    @property
    def kv_bytes_per_token(self) -> int:
        """ONNX graphs for CPUs cache float32, llama.cpp float16. As INT8 llama.cpp's q8_0 has a scale for 32 values."""
        if not self.int8_kv:
            return self.config.decoder.kv_bytes_per_token(4 if self.format == "onnx" else 2)
        plain = self.config.decoder.kv_bytes_per_token(1)
        return plain if self.format == "onnx" else plain * 34 // 32

    def decoder_tensors(self) -> list[TensorEntry]:
        return [entry for entry in self.tensors.values() if entry.part in ("decoder", "head")]

    def tower_tensors(self) -> list[TensorEntry]:
        return [entry for entry in self.tensors.values() if entry.part in ONNX_TOWER[self.format]]
