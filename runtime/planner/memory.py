"""Memory of a running model: what each engine keeps of the weights, the KV cache, and the working space of a stage.

ONNX Runtime copies weights into the layout of its kernels and frees the file's tensor after each copy: INT4 and INT8
blocks with accuracy_level 4 as integers, float32 scales and float32 sums, and beside them the scales once more, which
the graph's Cast widened; float16 matrices as float32. llama.cpp maps the file, and keeps Q4_0 layers a second time,
repacked. Seen with ONNX Runtime 1.30 and llama-cpp-python 0.3.36; `phisight plan MODEL --check` holds it against what a
process really takes.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from phisight.chunks import chunk_bytes
from phisight.config import ModelConfig
from phisight.manifest import Manifest, TensorEntry
from phisight.planner.times import CHUNK, Workload
from phisight.planner.variant import Variant

__all__ = ["Memory", "pair_needed", "predict_memory"]

PROCESS = 87 << 20
"""Python, NumPy, Pillow and an engine, before any weight."""
OPENVINO_COPIES = 2
"""Of the decoder's weights: as OpenVINO reads them, and in the layout of its kernels."""
TOKENIZER_BYTES = 420
"""Of the tokenizer a token of the vocabulary; llama.cpp keeps one of its own."""
GGUF_BATCH = 512
"""Positions that llama.cpp runs at once."""


@dataclass(frozen=True)
class Memory:
    """Bytes. `mapped` are pages of files, which are not in `weights`; `idle` of them are never read again.

    `loading` is what opening takes for a moment beyond what stays, mapped too: the system may drop it.
    """

    process: int
    weights: int
    mapped: int
    idle: int
    tower: int
    kv: int
    images: int
    working: int
    loading: int

    @property
    def opened(self) -> int:
        """Once the model is open."""
        return self.process + self.weights + self.mapped + self.tower

    @property
    def load_peak(self) -> int:
        return self.opened + self.loading

    @property
    def peak(self) -> int:
        """The most at once, as a system counts it."""
        return max(self.load_peak, self.opened + self.kv + self.images + self.working)

    @property
    def needed(self) -> int:
        """Below which pages are read from disk again and again."""
        return self.opened - self.idle + self.kv + self.images + self.working

    def as_json(self) -> dict[str, int]:
        told = {"opened": self.opened, "load_peak": self.load_peak, "peak": self.peak, "needed": self.needed}
        return asdict(self) | told


def predict_memory(variant: Variant, work: Workload) -> Memory:
    """Of a model that is open, with one conversation of this size."""
    config = variant.config
    positions = max(work.context, work.prompt)
    tower, tower_loading = _onnx(variant.tower_tensors())
    kv = positions * variant.kv_bytes_per_token
    encoding = _encoding(config, work.patches) if work.images else 0
    tokenizer = TOKENIZER_BYTES * config.decoder.vocab_size
    images = work.images * work.patches * config.decoder.hidden_size * 4
    if variant.format == "onnx":
        weights, loading = _onnx(variant.decoder_tensors())
        tables = config.decoder.context_length * config.decoder.head_dim * 4
        prefill = chunk_bytes(config.decoder, min(CHUNK, work.prompt))
        return Memory(
            process=PROCESS + tokenizer,
            weights=weights + tables,
            mapped=0,
            idle=0,
            tower=tower,
            kv=kv,
            images=images,
            working=max(prefill, encoding),
            loading=max(loading, tower_loading),
        )
    batch = min(GGUF_BATCH, positions)
    scores = batch * config.decoder.num_heads * positions * 4
    prefill = scores + 4 * batch * (config.decoder.intermediate_size + config.decoder.hidden_size)
    repacked = _repacked(variant)
    return Memory(
        process=PROCESS + 2 * tokenizer,
        weights=repacked,
        mapped=max((size for name, size in variant.files.items() if name.startswith("model-")), default=0),
        idle=repacked,
        tower=tower,
        kv=kv,
        images=images,
        working=prefill + encoding,  # buffers of a context stay while the next image is encoded
        loading=tower_loading,
    )


def pair_needed(manifest: Manifest, positions: int) -> int:
    """Bytes of a model that ONNX Runtime and OpenVINO hold both, with so many positions in the KV cache of each."""
    decoder, tower = (
        [entry for entry in manifest.tensors.values() if entry.part in parts]
        for parts in (("decoder", "head"), ("vision", "projector"))
    )
    config = manifest.model.decoder
    copies = OPENVINO_COPIES * sum(entry.bytes for entry in decoder)
    cache = 2 * positions * config.kv_bytes_per_token(4)
    return PROCESS + _onnx(decoder)[0] + _onnx(tower)[0] + copies + cache + chunk_bytes(config, CHUNK)


def _onnx(entries: list[TensorEntry]) -> tuple[int, int]:
    """(bytes that ONNX Runtime keeps, bytes that it needs beyond them while it opens the file)."""
    kept, floats, largest = 0.0, 0, 0
    for entry in entries:
        if blocks := re.match(r"int(\d) block (\d+)", entry.scheme):
            bits, size = int(blocks[1]), int(blocks[2])
            kept += entry.weights * (bits / 8 + 3 * 4 / size)
            largest = max(largest, entry.bytes)
        elif entry.scheme == "f16":
            kept += 4 * entry.weights
            floats += entry.bytes
        else:
            kept += entry.bytes
            largest = max(largest, entry.bytes)
    # Casts of floats are folded before any tensor is freed; a packed tensor is freed before the next is packed.
    return int(kept), max(floats, largest)


def _encoding(config: ModelConfig, patches: int) -> int:
    """Working space of the tower, in float32: the feed-forward layer's values before and after each step."""
    v = config.vision
    return 0 if v is None else 4 * patches * (4 * v.intermediate_size + 3 * v.hidden_size)


def _repacked(variant: Variant) -> int:
    """What llama.cpp keeps a second time: layers in Q4_0, where most weights are that."""
    layers = [entry for entry in variant.tensors.values() if entry.part == "decoder"]
    plain = sum(entry.bytes for entry in layers if entry.scheme in ("q4_0", "iq4_nl"))
    return plain if 2 * plain > sum(entry.bytes for entry in layers) else 0
