"""The ways to export a model that a planner compares, each with its sizes and the command that makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from phisight.config import ModelConfig, VisionConfig
from phisight.errors import InputError, ModelDirError
from phisight.export.checkpoint import Checkpoint
from phisight.export.file_sizes import file_sizes
from phisight.export.gguf_plan import GgufOptions, make_gguf_plan
from phisight.export.plan import ExportOptions, make_plan
from phisight.export.synth import synthetic_model
from phisight.manifest import INT8_KV_GRAPH, Manifest
from phisight.planner.variant import Variant

__all__ = ["CHOICES", "all_variants", "decoder_kind", "head_kind", "model_variant", "options_of", "real_model"]

CHOICES: tuple[ExportOptions | GgufOptions, ...] = (
    ExportOptions(),
    ExportOptions(block_size=128),
    ExportOptions(decoder="int8"),
    ExportOptions(decoder="f16"),
    GgufOptions("Q4_0"),
    GgufOptions("Q4_K_M"),
    GgufOptions("Q8_0"),
)
KvType = Literal["int8"] | None
"""None is a float cache."""
REAL_LAYERS, REAL_TOWER_LAYERS = 40, 27
"""Of the 15B model; the widths are those of `synthetic_model`."""


def real_model() -> ModelConfig:
    """The configuration of microsoft/Phi-4-reasoning-vision-15B."""
    model = synthetic_model("real", REAL_LAYERS)
    assert isinstance(model.vision, VisionConfig)
    return replace(model, vision=replace(model.vision, num_layers=REAL_TOWER_LAYERS))


def all_variants(
    checkpoint: Checkpoint, name: str, kv: KvType = None
) -> list[tuple[Variant, ExportOptions | GgufOptions]]:
    """Of a checkpoint that the user calls `name`, with this KV cache; the options are those that decide rates.

    Raises TokenizerError, as the exports would.
    """
    return [(_variant(checkpoint, options, name, kv), options) for options in CHOICES]


def model_variant(manifest: Manifest, name: str, kv: KvType = None) -> tuple[Variant, ExportOptions | GgufOptions]:
    """What an exported model is when it runs with this KV cache.

    Raises ModelDirError for options that this version does not know, InputError for a cache it was not exported for.
    """
    if kv is not None and manifest.format == "onnx" and INT8_KV_GRAPH not in manifest.files:
        raise InputError(
            f"--kv is {kv}, but {name} was exported without it: plan its checkpoint, or export it with --kv {kv}"
        )
    options = options_of(manifest)
    variant = Variant(
        name=name,
        format="gguf" if isinstance(options, GgufOptions) else "onnx",
        config=manifest.model,
        files={file: entry.bytes for file, entry in manifest.files.items()},
        tensors=manifest.tensors,
        decoder=decoder_kind(options),
        head=head_kind(options),
        tower=_tower(options),
        command=f"phisight run {name} QUESTION --image FILE{_kv_argument(kv)}",
        int8_kv=kv is not None,
    )
    return variant, options


def options_of(manifest: Manifest) -> ExportOptions | GgufOptions:
    """Those of an export that decide its kinds of weights. Raises ModelDirError."""
    chosen = manifest.options
    try:
        if manifest.format == "gguf":
            return GgufOptions(
                str(chosen["decoder"]).upper(),
                onnx_vision=chosen["onnx_vision"],  # type: ignore[arg-type]  # the class checks it
            )
        names = {"decoder", "vision", "block_size", "head", "accuracy_level"}
        return ExportOptions(
            **{key: value for key, value in chosen.items() if key in names},  # type: ignore[arg-type]
            float_type="f16" if chosen.get("float") == "f16" else "f32",
        )
    except KeyError as error:
        raise ModelDirError(f"the manifest does not name its option {error.args[0]}: export the model again") from None


def decoder_kind(options: ExportOptions | GgufOptions) -> str:
    """The kind of weights that decides a decoder's speed."""
    if isinstance(options, GgufOptions):
        return f"gguf {options.decoder.lower()}"
    blocks = f" block {options.block_size}" if options.decoder in ("int4", "int8") else ""
    return f"onnx {options.decoder}{blocks}"


def head_kind(options: ExportOptions | GgufOptions) -> str:
    """The kind of the head's weights: blocks of 32 stand for those of other sizes. GGUF's goes as its layers."""
    if isinstance(options, GgufOptions) or options.resolved_head == options.decoder:
        return decoder_kind(options)
    return decoder_kind(ExportOptions(decoder=options.resolved_head))


def _tower(options: ExportOptions | GgufOptions) -> str:
    return options.onnx_vision if isinstance(options, GgufOptions) else options.resolved_vision


def _variant(checkpoint: Checkpoint, options: ExportOptions | GgufOptions, name: str, kv: KvType) -> Variant:
    """An ONNX model must be exported for its KV cache, llama.cpp is told when it runs."""
    gguf = isinstance(options, GgufOptions)
    plan = (
        make_gguf_plan(checkpoint, options)
        if isinstance(options, GgufOptions)
        else make_plan(checkpoint.config, replace(options, kv=kv))
    )
    kind = decoder_kind(options)
    return Variant(
        name=kind.replace("gguf ", "GGUF ").replace("onnx ", "ONNX ").upper().replace("BLOCK", "block"),
        format="gguf" if gguf else "onnx",
        config=checkpoint.config,
        files=file_sizes(checkpoint, plan),
        tensors=plan.entries(),
        decoder=kind,
        head=head_kind(options),
        tower=_tower(options),
        command=f"phisight export {name} {_place(options)}{_arguments(options)}{'' if gguf else _kv_argument(kv)}",
        int8_kv=kv is not None,
    )


def _kv_argument(kv: KvType) -> str:
    return "" if kv is None else f" --kv {kv}"


def _place(options: ExportOptions | GgufOptions) -> str:
    """A name for the directory."""
    if isinstance(options, GgufOptions):
        return f"phi4-{options.decoder.lower()}"
    return f"phi4-{options.decoder}" + (f"-b{options.block_size}" if options.block_size != 32 else "")


def _arguments(options: ExportOptions | GgufOptions) -> str:
    if isinstance(options, GgufOptions):
        return f" --format gguf --decoder {options.decoder.lower()}"
    return f" --decoder {options.decoder}" + (f" --block-size {options.block_size}" if options.block_size != 32 else "")
