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

    `decoder`, `head` and `tower` name the rates that apply to them.
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
        """ONNX graphs for CPUs cache float32, llama.cpp float16."""
        return self.config.decoder.kv_bytes_per_token(4 if self.format == "onnx" else 2)

    def decoder_tensors(self) -> list[TensorEntry]:
        return [entry for entry in self.tensors.values() if entry.part in ("decoder", "head")]

    def tower_tensors(self) -> list[TensorEntry]:
        return [entry for entry in self.tensors.values() if entry.part in ONNX_TOWER[self.format]]
