"""Opening a model: which files, which engine, which device, and why.

directory with phisight.json  -> ONNX Runtime, or llama.cpp for a GGUF directory with the tower as ONNX if it is there
FILE.gguf (and an mmproj)     -> llama.cpp
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phisight.chat_template import read_chat_template
from phisight.chunks import ImageAttention
from phisight.errors import InputError
from phisight.gguf_loading import GgufFiles, LlamaCppSettings, VisionEngine, load_gguf
from phisight.loading_checks import (
    attention_notes,
    check_vocabulary,
    checked_attention,
    checked_context,
    decoder_graph,
)
from phisight.manifest import FILE_NAME, Manifest
from phisight.model import Model
from phisight.onnx_engines import open_engines
from phisight.prompt import PromptBuilder
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phisight.devices import DeviceChoice

__all__ = ["checkpoint_directory", "is_checkpoint", "load", "model_directory"]

DEMO = Path(str(files("phisight"))) / "demo"
"""The built-in model: its checkpoint, and that exported."""


def model_directory(name: str | Path) -> Path:
    """The directory that `name` means: the built-in model for "demo", else the path itself."""
    return DEMO / "onnx" if name == "demo" else Path(name)


def checkpoint_directory(name: str | Path) -> Path:
    """The checkpoint that `name` means: the built-in model's for "demo", else the path itself."""
    return DEMO / "checkpoint" if name == "demo" else Path(name)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint rather than an exported model."""
    return (directory / "config.json").is_file() and not (directory / FILE_NAME).is_file()


def load(
    path: str | Path = "demo",
    *,
    mmproj: str | Path | None = None,
    device: str | DeviceChoice = "auto",
    threads: int | Literal["auto"] = "auto",
    context: int | None = None,
    accuracy_level: Literal[0, 4] | None = None,
    image_attention: ImageAttention | None = None,
    vision_engine: VisionEngine = "auto",
    gpu_layers: int = 0,
    kv_type: Literal["f32", "f16", "q8_0", "int8"] | None = None,
    repack: bool | None = None,
    verbose: bool = False,
) -> Model:
    """Open an exported model directory, a GGUF file with or without its mmproj, or the built-in model.

    Sizes and headers are checked, not hashes. `context` may shorten the model's context, in positions.
    `image_attention` "bidirectional" lets the tokens of an image see each other, which an ONNX model must be exported
    for; "causal" is the reference's way, which every model can go; None is what the export says.

    `kv_type` is that of the KV cache: None is float16 for GGUF, and the type in which an ONNX model's graph computes.
    "int8" and "q8_0" mean the same, which an ONNX model must be exported for.

    For ONNX: `device` "auto", "cpu", "cuda", "webgpu", "openvino" and "openvino:GPU" for that engine, "openvino+cpu"
    for both (see `phisight.backends.paired`), or a choice that was made already; `accuracy_level` overrides that of the
    export.
    For GGUF: `vision_engine` "onnx" runs the tower of a directory's vision.onnx (the default where it is there), "mtmd"
    llama.cpp's own; `gpu_layers` of the decoder go on a GPU; `repack` None chooses whether llama.cpp keeps a second,
    faster copy of the weights (see `LlamaCppDecoder`); `verbose` shows llama.cpp's log.

    Raises ModelDirError, InputError, or EngineError if an engine is missing or the device cannot be used.
    """
    directory = model_directory(path)
    gguf = LlamaCppSettings(gpu_layers, "q8_0" if kv_type == "int8" else kv_type or "f16", repack, verbose)
    if directory.is_file():
        _check_device_of_gguf(device, directory)
        return load_gguf(GgufFiles.of_files(directory, mmproj), threads, context, vision_engine, gguf, image_attention)
    if mmproj is not None:
        raise InputError(f"mmproj goes with a GGUF file, but {directory} is a directory: leave it out")
    manifest = Manifest.read(directory)
    if manifest.format == "gguf":
        if accuracy_level is not None:
            raise InputError(f"{directory} is a GGUF model: accuracy_level is for ONNX models")
        _check_device_of_gguf(device, directory)
        files = GgufFiles.of_directory(directory, manifest)
        return load_gguf(files, threads, context, vision_engine, gguf, image_attention)
    if replace(gguf, kv_type="f16") != LlamaCppSettings() or vision_engine != "auto":
        raise InputError(f"{directory} is an ONNX model: gpu_layers, repack and vision_engine are for GGUF")
    graph = decoder_graph(directory, manifest, kv_type)
    return _load_onnx(directory, manifest, graph, device, threads, context, accuracy_level, image_attention)


def _check_device_of_gguf(device: str | DeviceChoice, path: Path) -> None:
    if device not in ("auto", "cpu"):
        raise InputError(f"device is {device}, but {path} is a GGUF model: gpu_layers puts layers of it on a GPU")


def _load_onnx(
    directory: Path,
    manifest: Manifest,
    graph: str,
    device: str | DeviceChoice,
    threads: int | Literal["auto"],
    context: int | None,
    accuracy_level: Literal[0, 4] | None,
    image_attention: ImageAttention | None,
) -> Model:
    from phisight.devices import choose_device

    config = manifest.model
    attention = checked_attention(image_attention, manifest)
    chosen = choose_device(device, str(manifest.options.get("float", "f32"))) if isinstance(device, str) else device
    choice = choose_threads(threads)
    notes = [f"device {chosen.name}: {chosen.reason}", f"{choice.count} threads: {choice.reason}"]
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    check_vocabulary(tokenizer, config, directory)
    engines = open_engines(directory, manifest, graph, chosen, choice.count, accuracy_level)
    if attention == "bidirectional" and not engines.decoder.bidirectional:
        raise InputError(
            f"{directory} was exported with causal image attention only: export it with --image-attention "
            "bidirectional, which can be run either way, or leave the option out"
        )
    return Model(
        manifest,
        tokenizer,
        PromptBuilder(tokenizer, read_chat_template(directory)),
        engines.encoder,
        engines.decoder,
        context=checked_context(context, config.decoder.context_length),
        image_attention=attention,
        notes=(*notes, *engines.notes, *attention_notes(attention, manifest)),
    )
