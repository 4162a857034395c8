"""Opening GGUF files with llama.cpp, and their vision tower with ONNX Runtime or llama.cpp."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from phisight.backends.base import VisionEncoder
from phisight.chat_template import read_chat_template
from phisight.chunks import ImageAttention
from phisight.errors import EngineError, InputError, ModelDirError
from phisight.gguf_config import config_from_gguf
from phisight.gguf_file import GgufFile
from phisight.gguf_tokenizer import template_from_gguf, tokenizer_from_gguf
from phisight.loading_checks import attention_notes, check_vocabulary, checked_attention, checked_context
from phisight.manifest import Manifest
from phisight.model import Model
from phisight.prompt import PromptBuilder
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phisight.backends.llamacpp import LlamaCppDecoder

__all__ = ["GgufFiles", "KvType", "LlamaCppSettings", "VisionEngine", "load_gguf"]

VisionEngine = Literal["auto", "onnx", "mtmd"]
KvType = Literal["f32", "f16", "q8_0"]


@dataclass(frozen=True)
class LlamaCppSettings:
    """What only llama.cpp knows: layers on a GPU, the KV cache's type, whether weights are repacked, its log."""

    gpu_layers: int = 0
    kv_type: KvType = "f16"
    repack: bool | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.gpu_layers < 0:
            raise InputError(f"gpu_layers is {self.gpu_layers}, wanted 0 or more")
        if self.kv_type not in get_args(KvType):
            raise InputError(f"kv_type is {self.kv_type!r}, wanted one of {', '.join(get_args(KvType))}")


@dataclass(frozen=True)
class GgufFiles:
    """The files of a model: the text file, the mmproj, the directory with the tower as ONNX, whichever there are."""

    text: Path
    mmproj: Path | None
    onnx: Path | None
    manifest: Manifest
    tokenizer: Tokenizer
    template: str | None

    @classmethod
    def of_directory(cls, directory: Path, manifest: Manifest) -> GgufFiles:
        """An exported directory. Raises ModelDirError, TokenizerError."""
        names = [name for name in manifest.files if name.endswith(".gguf")]
        text = next((name for name in names if name.startswith("model-")), None)
        mmproj = next((name for name in names if name.startswith("mmproj-")), None)
        if text is None:
            raise ModelDirError(f"{directory} names no file model-*.gguf in its manifest: export it again")
        pair = None if mmproj is None else directory / mmproj
        config_from_gguf(GgufFile.read(directory / text), None if pair is None else GgufFile.read(pair))
        return cls(
            directory / text,
            pair,
            directory if "vision.onnx" in manifest.files else None,
            manifest,
            Tokenizer.from_file(directory / "tokenizer.json"),
            read_chat_template(directory),
        )

    @classmethod
    def of_files(cls, text: str | Path, mmproj: str | Path | None) -> GgufFiles:
        """Bare files, made by anyone. Raises ModelDirError, TokenizerError."""
        file = GgufFile.read(text)
        pair = None if mmproj is None else GgufFile.read(mmproj)
        config = config_from_gguf(file, pair)
        manifest = Manifest("gguf", version("phisight"), config, options={}, files={}, tensors={})
        return cls(
            Path(text),
            None if mmproj is None else Path(mmproj),
            None,
            manifest,
            tokenizer_from_gguf(file.metadata),
            template_from_gguf(file.metadata),
        )


def load_gguf(
    files: GgufFiles,
    threads: int | Literal["auto"],
    context: int | None,
    vision_engine: VisionEngine,
    settings: LlamaCppSettings,
    image_attention: ImageAttention | None = None,
) -> Model:
    """Open the files. llama.cpp can attend either way; `image_attention` None takes the directory's.

    Raises InputError, ModelDirError, EngineError.
    """
    from phisight.backends.llamacpp import LlamaCppDecoder

    config = files.manifest.model
    check_vocabulary(files.tokenizer, config, files.text)
    most = checked_context(context, config.decoder.context_length)
    choice = choose_threads(threads)
    repack = _repack(files.text) if settings.repack is None else settings.repack
    decoder = LlamaCppDecoder(
        files.text,
        threads=choice.count,
        context=most,
        gpu_layers=settings.gpu_layers,
        kv_type=settings.kv_type,
        repack=repack,
        verbose=settings.verbose,
    )
    encoder, engine = _encoder(files, decoder, vision_engine, choice.count)
    attention = checked_attention(image_attention, files.manifest)
    notes = [
        f"{choice.count} threads: {choice.reason}",
        f"decoder: llama.cpp, {settings.gpu_layers} layers on a GPU, weights {'' if repack else 'not '}repacked, "
        f"KV cache {settings.kv_type}",
        f"vision: {engine}",
        *attention_notes(attention, files.manifest, whole_scores=settings.kv_type != "q8_0"),
    ]
    prompts = PromptBuilder(files.tokenizer, files.template)
    return Model(
        files.manifest,
        files.tokenizer,
        prompts,
        encoder,
        decoder,
        context=most,
        image_attention=attention,
        notes=tuple(notes),
    )


def _repack(text: Path) -> bool:
    """Whether llama.cpp is faster with a second, repacked copy of the weights: for most of INT4 in plain blocks only.

    Measured: Q4_0 prefills twice as fast repacked, Q4_K half as fast again without.
    """
    size: Counter[str] = Counter()
    for tensor in GgufFile.read(text).tensors.values():
        size[tensor.type_name] += tensor.bytes
    return size.most_common(1)[0][0] in ("Q4_0", "IQ4_NL")


def _encoder(
    files: GgufFiles, decoder: LlamaCppDecoder, engine: VisionEngine, threads: int
) -> tuple[VisionEncoder | None, str]:
    """The tower on the engine asked for, and the choice in words. Raises InputError, EngineError."""
    if engine not in get_args(VisionEngine):
        raise InputError(f"vision_engine is {engine!r}, wanted one of {', '.join(get_args(VisionEngine))}")
    if files.manifest.model.vision is None:
        return None, "none, the model is text only or was opened without its mmproj"
    if engine == "onnx" and files.onnx is None:
        raise InputError(f"{files.text.parent} holds no vision.onnx: use vision_engine mtmd, or export it with one")
    if engine != "mtmd" and files.onnx is not None:
        encoder = _onnx_encoder(files, threads, required=engine == "onnx")
        if encoder is not None:
            return encoder, "ONNX Runtime, exact preprocessing"
    if files.mmproj is None:
        raise InputError(f"{files.text} has no mmproj: give it with mmproj, or use vision_engine onnx")
    from phisight.backends.mtmd import MtmdVisionEncoder

    return MtmdVisionEncoder(files.mmproj, decoder.model, threads=threads), "llama.cpp, exact preprocessing"


def _onnx_encoder(files: GgufFiles, threads: int, *, required: bool) -> VisionEncoder | None:
    """None if ONNX Runtime is not installed and not required: llama.cpp then runs the mmproj."""
    from phisight.backends.ort import OrtVisionEncoder
    from phisight.backends.ort_session import SessionSettings, integer_products

    if files.onnx is None:
        return None
    try:
        settings = SessionSettings(threads=threads, products=integer_products())
        return OrtVisionEncoder(files.onnx, settings, files.manifest.model.decoder.hidden_size)
    except EngineError:
        if required:
            raise
        return None
