"""The engines that run an ONNX directory: ONNX Runtime, or OpenVINO for what it computes rightly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phisight.backends.base import VisionEncoder
from phisight.devices import DeviceChoice
from phisight.errors import InputError
from phisight.manifest import INT8_KV_GRAPH, Manifest

if TYPE_CHECKING:
    from phisight.backends.openvino import OpenVinoDecoder
    from phisight.backends.ort import OrtDecoder
    from phisight.backends.paired import PairedDecoder

__all__ = ["OnnxEngines", "open_engines"]

ROUNDED_ROWS = "int8 channel"
"""The scheme of layers that round their inputs to INT8 (w8a8): only the tower and the projector have it."""


@dataclass(frozen=True)
class OnnxEngines:
    """An open decoder, and an encoder unless the model is text only; `notes` are for the user."""

    encoder: VisionEncoder | None
    decoder: OrtDecoder | OpenVinoDecoder | PairedDecoder
    notes: tuple[str, ...]


def open_engines(
    directory: Path,
    manifest: Manifest,
    graph: str,
    chosen: DeviceChoice,
    threads: int,
    accuracy_level: Literal[0, 4] | None,
) -> OnnxEngines:
    """Open `graph` and the tower. Raises EngineError, and InputError for what the engine asked for cannot run."""
    if chosen.openvino is not None:
        return _openvino(directory, manifest, graph, chosen, threads, accuracy_level)
    from phisight.backends.ort import OrtDecoder, OrtVisionEncoder
    from phisight.backends.ort_session import SessionSettings, integer_products

    config = manifest.model
    products = integer_products()
    settings = SessionSettings(chosen.device, threads, accuracy_level, products)
    notes = []
    if chosen.device == "webgpu":
        if graph == INT8_KV_GRAPH:
            raise InputError("kv_type is int8, which WebGPU's attention cannot read: leave it out, or take device cpu")
        if _rounds_rows(manifest):
            raise InputError(
                "WebGPU has no INT8 products, which this model's w8a8 layers need: export with --vision f16 or int8, "
                "or take device cpu"
            )
    if not products.exact and chosen.device == "cpu":
        notes.append("this processor's INT8 products saturate: slower, exact kernels are used")
    encoder = None if config.vision is None else OrtVisionEncoder(directory, settings, config.decoder.hidden_size)
    decoder = OrtDecoder(directory, settings, config.decoder, graph)
    if graph == INT8_KV_GRAPH:
        notes.append(f"KV cache int8: {decoder.kv_bytes_per_token / 1024:g} KiB a token")
    return OnnxEngines(encoder, decoder, tuple(notes))


def _openvino(
    directory: Path,
    manifest: Manifest,
    graph: str,
    chosen: DeviceChoice,
    threads: int,
    accuracy_level: Literal[0, 4] | None,
) -> OnnxEngines:
    from phisight.backends.openvino import OpenVinoDecoder, OpenVinoSettings, OpenVinoVisionEncoder
    from phisight.backends.ort import OrtDecoder, OrtVisionEncoder
    from phisight.backends.ort_session import SessionSettings, integer_products
    from phisight.backends.paired import PairedDecoder

    if graph == INT8_KV_GRAPH:
        raise InputError("kv_type is int8, which OpenVINO cannot read: leave it out, or take device cpu")
    level: Literal[0, 4] = accuracy_level if accuracy_level is not None else _own_level(manifest)
    settings = OpenVinoSettings(chosen.openvino or "CPU", threads, manifest.least_block if level else None)
    on_cpu = SessionSettings("cpu", threads, accuracy_level, integer_products())
    config = manifest.model
    encoder: VisionEncoder | None = None
    notes = []
    if config.vision is not None and _rounds_rows(manifest):
        notes.append("the tower is w8a8, which OpenVINO computes wrongly: ONNX Runtime runs it, on the CPU")
        encoder = OrtVisionEncoder(directory, on_cpu, config.decoder.hidden_size)
    elif config.vision is not None:
        encoder = OpenVinoVisionEncoder(directory, settings, config.decoder.hidden_size)
    decoder = OpenVinoDecoder(directory, settings, config.decoder)
    if not chosen.paired:
        return OnnxEngines(encoder, decoder, tuple(notes))
    notes.append("OpenVINO runs prompts and ONNX Runtime the answer's tokens: the decoder is in memory twice")
    paired = PairedDecoder(decoder, OrtDecoder(directory, on_cpu, config.decoder))
    return OnnxEngines(encoder, paired, tuple(notes))


def _rounds_rows(manifest: Manifest) -> bool:
    return any(entry.scheme == ROUNDED_ROWS for entry in manifest.tensors.values())


def _own_level(manifest: Manifest) -> Literal[0, 4]:
    return 0 if manifest.options.get("accuracy_level") == 0 else 4
