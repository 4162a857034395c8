"""An engine with its files and settings, and the work of each stage on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from phisight.backends.base import Decoder, VisionEncoder
from phisight.backends.llamacpp_library import Flash
from phisight.backends.ort_session import Device
from phisight.bench.clock import seconds_of
from phisight.bench.stages import Stage
from phisight.config import ModelConfig
from phisight.naflex import PATCH_SIZE, PATCH_VALUES, Patches

if TYPE_CHECKING:
    from phisight.backends.openvino import OpenVinoDecoder

__all__ = ["Contender", "Figures", "Opened"]

CONTEXT = 1024
"""Positions of room in the KV cache."""
ALL_LAYERS = 999
"""llama.cpp's usual way to say so."""
DECODE_BEHIND = 64
"""Positions that are cached before steps are timed."""


@dataclass(frozen=True)
class Figures:
    """What a process measured of itself: seconds to open the files, most memory in use in bytes (None: not told)."""

    load_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Contender:
    """One engine: ONNX Runtime on a directory, OpenVINO on its decoder, llama.cpp on model.gguf and mmproj.gguf in it.

    "openvino+cpu" is ONNX Runtime with OpenVINO for the chunks of a prompt.

    `device` is where ONNX Runtime runs; llama.cpp then has all layers and its tower on the GPU that it was built for.
    `group` is OpenVINO's: activations that share a scale where they are rounded.
    `repack` and `flash` are llama.cpp's: whether weights are kept in a second layout, and flash attention.
    `same_weights`: whether the files hold the very numbers of ours, so that only engines are compared.
    """

    name: str
    engine: Literal["onnxruntime", "openvino", "openvino+cpu", "llama.cpp"]
    directory: Path
    config: ModelConfig
    threads: int
    device: Device = "cpu"
    repack: bool = True
    flash: Flash = "auto"
    same_weights: bool = True
    group: int | None = None

    def settings(self) -> dict[str, str | int | bool]:
        """For the report."""
        shown: dict[str, str | int | bool] = {"name": self.name, "engine": self.engine, "threads": self.threads}
        shown["device"] = self.device if self.engine != "llama.cpp" or self.device == "cpu" else "gpu"
        return shown if self.engine != "llama.cpp" else shown | {"repack": self.repack, "flash_attention": self.flash}

    def open(self) -> Opened:
        """Raises EngineError, ModelDirError."""
        match self.engine:
            case "onnxruntime" | "openvino+cpu":
                return _open_onnx(self)
            case "openvino":
                return Opened(self.config, _openvino_decoder(self), None)
            case "llama.cpp":
                return _open_llama(self)


@dataclass
class Opened:
    """An open encoder and decoder, and stages run on them."""

    config: ModelConfig
    decoder: Decoder
    encoder: VisionEncoder | None

    def seconds(self, stage: Stage) -> float:
        """Run the stage once. Raises EngineError."""
        rng = np.random.default_rng(stage.units)
        width = self.config.decoder.hidden_size
        ids = rng.integers(0, min(256, self.config.decoder.vocab_size), max(stage.units, DECODE_BEHIND), np.int32)
        self.decoder.truncate(0)
        match stage.kind:
            case "encode":
                assert self.encoder is not None
                rows, columns = stage.grid
                # Whole levels of brightness, since llama.cpp is handed a picture.
                levels = rng.integers(0, 256, (rows * columns, PATCH_VALUES)).astype(np.float32)
                pixels = levels / np.float32(127.5) - np.float32(1)
                patches = Patches(pixels, stage.grid, (PATCH_SIZE * columns, PATCH_SIZE * rows))
                encoder = self.encoder
                return seconds_of(lambda: encoder.encode(patches))
            case "prefill":
                self.decoder.reserve(CONTEXT)
                return seconds_of(lambda: self.decoder.append([ids[: stage.units]]))
            case "prefill_image":
                features = rng.normal(0, 0.02, (stage.units, width)).astype(np.float32)
                self.decoder.reserve(CONTEXT)
                return seconds_of(lambda: self.decoder.append([features]))
            case "decode":
                self.decoder.reserve(CONTEXT)
                self.decoder.append([ids[:DECODE_BEHIND]])
                self.decoder.append([ids[:1]])
                return (
                    seconds_of(lambda: [self.decoder.append([ids[i : i + 1]]) for i in range(stage.units)])
                    / stage.units
                )
            case _:
                raise ValueError(f"{stage.name} is not run on an open engine")


def _open_onnx(contender: Contender) -> Opened:
    from phisight.backends.ort import OrtDecoder, OrtVisionEncoder
    from phisight.backends.ort_session import SessionSettings, integer_products

    config = contender.config
    settings = SessionSettings(contender.device, contender.threads, None, integer_products())
    encoder = None
    if config.vision is not None:
        encoder = OrtVisionEncoder(contender.directory, settings, config.decoder.hidden_size)
    steps = OrtDecoder(contender.directory, settings, config.decoder)
    if contender.engine == "openvino+cpu":
        from phisight.backends.paired import PairedDecoder

        return Opened(config, PairedDecoder(_openvino_decoder(contender), steps), encoder)
    return Opened(config, steps, encoder)


def _openvino_decoder(contender: Contender) -> OpenVinoDecoder:
    from phisight.backends.openvino import OpenVinoDecoder, OpenVinoSettings

    settings = OpenVinoSettings("CPU", contender.threads, contender.group)
    return OpenVinoDecoder(contender.directory, settings, contender.config.decoder)


def _open_llama(contender: Contender) -> Opened:
    from phisight.backends.llamacpp import LlamaCppDecoder
    from phisight.backends.mtmd import MtmdVisionEncoder

    gpu = contender.device != "cpu"
    decoder = LlamaCppDecoder(
        contender.directory / "model.gguf",
        threads=contender.threads,
        context=CONTEXT,
        gpu_layers=ALL_LAYERS if gpu else 0,
        repack=contender.repack,
        flash=contender.flash,
    )
    encoder = None
    if contender.config.vision is not None:
        mmproj = contender.directory / "mmproj.gguf"
        encoder = MtmdVisionEncoder(mmproj, decoder.model, threads=contender.threads, gpu=gpu)
    return Opened(contender.config, decoder, encoder)
