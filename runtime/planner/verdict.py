"""Whether a variant fits a machine, and what of it fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from phisight.manifest import Manifest
from phisight.planner.memory import Memory, pair_needed
from phisight.planner.times import Workload
from phisight.planner.variant import Variant

__all__ = ["GpuShare", "Verdict", "gpu_share", "judge", "judge_pair"]

SYSTEM_SHARE = 0.9
"""Of the memory that a model may take: the rest is the system's and other programs'."""
GPU_BUFFERS = 700 << 20
"""Assumed for what a GPU's driver and llama.cpp's buffers take beside weights and cache."""


@dataclass(frozen=True)
class Verdict:
    """`fits`, and the reason in words."""

    fits: bool
    reason: str


@dataclass(frozen=True)
class GpuShare:
    """Decoder layers that fit on a GPU, of how many, and the bytes that they take with their KV cache."""

    layers: int
    of: int
    bytes: int


def judge(memory: Memory, available: int) -> Verdict:
    """Pages of files that are not read again do not count: the system drops them where it needs room."""
    room = int(SYSTEM_SHARE * available)
    told = f"needs {memory.needed / 1e9:.1f} of {room / 1e9:.1f} GB"
    if memory.needed <= room:
        return Verdict(True, told)
    if memory.mapped and memory.needed - (memory.mapped - memory.idle) <= room:
        return Verdict(False, f"{told}: each token would read {(memory.needed - room) / 1e9:.1f} GB from disk")
    return Verdict(False, told)


def judge_pair(manifest: Manifest, positions: int, available: int) -> Verdict:
    """Whether ONNX Runtime and OpenVINO may hold a model both, with so many positions in the KV cache of each."""
    needed, room = pair_needed(manifest, positions), int(SYSTEM_SHARE * available)
    return Verdict(needed <= room, f"needs {needed / 1e9:.1f} of {room / 1e9:.1f} GB")


def gpu_share(variant: Variant, work: Workload, vram: int) -> GpuShare | None:
    """As many layers of a GGUF decoder as fit (--gpu-layers); None for ONNX, which runs whole on a device or not."""
    if variant.format != "gguf":
        return None
    layers = variant.config.decoder.num_layers
    weights = sum(entry.bytes for entry in variant.tensors.values() if entry.part == "decoder")
    cache = max(work.context, work.prompt) * variant.kv_bytes_per_token
    each = (weights + cache) // layers
    count = max(0, min(layers, (vram - GPU_BUFFERS) // each))
    return GpuShare(count, layers, count * each)
