"""Checks that every way of opening a model makes."""

from __future__ import annotations

from pathlib import Path

from phisight.chunks import ImageAttention, check_image_attention, chunk_bytes
from phisight.config import ModelConfig
from phisight.errors import InputError, ModelDirError, PromptError
from phisight.manifest import INT8_KV_GRAPH, Manifest
from phisight.tokenizer import Tokenizer

__all__ = ["attention_notes", "check_vocabulary", "checked_attention", "checked_context", "decoder_graph", "kv_types"]


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Raises ModelDirError if the tokenizer has more tokens than the decoder."""
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ModelDirError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, "
            f"the decoder {config.decoder.vocab_size}: they belong to different models"
        )


def checked_context(context: int | None, most: int) -> int:
    """The context asked for, or the model's own. Raises PromptError if it is out of range."""
    if context is None:
        return most
    if not 1 < context <= most:
        raise PromptError(f"context is {context} positions, wanted 2 to the model's {most}")
    return context


def kv_types(manifest: Manifest) -> tuple[str, ...]:
    """Types of KV cache that an ONNX directory can be opened with, its own first."""
    own = str(manifest.options.get("float", "f32"))
    return (own, "int8") if INT8_KV_GRAPH in manifest.files else (own,)


def decoder_graph(directory: Path, manifest: Manifest, kv_type: str | None) -> str:
    """The graph of an ONNX directory that has a KV cache of this type, None its own. Raises InputError."""
    own, *others = kv_types(manifest)
    if kv_type in (None, own):
        return "decoder.onnx"
    if kv_type not in ("q8_0", "int8"):
        raise InputError(
            f"kv_type is {kv_type}, but {directory} computes in {own} and its KV cache is of that type: leave it out, "
            "or give int8 for a model exported with --kv int8"
        )
    if "int8" not in others:
        raise InputError(
            f"kv_type is {kv_type}, which needs scales measured at export, but {directory} has no {INT8_KV_GRAPH}: "
            "export it again with --kv int8, or leave it out"
        )
    return INT8_KV_GRAPH


def checked_attention(asked: ImageAttention | None, manifest: Manifest) -> ImageAttention:
    """The image attention asked for, or that of the export. Raises InputError for one that has no meaning here."""
    if asked is None:
        return manifest.image_attention
    check_image_attention(asked)
    if asked == "bidirectional" and manifest.model.images is None:
        raise InputError(
            "image_attention is bidirectional, but this model takes no images: it was made of a text-only checkpoint, "
            "or is a GGUF file opened without its mmproj; leave it out"
        )
    return asked


def attention_notes(attention: ImageAttention, manifest: Manifest, *, whole_scores: bool = False) -> list[str]:
    """What image attention other than the reference's means for memory; `whole_scores` as for `chunk_bytes`."""
    images = manifest.model.images
    if attention == "causal" or images is None:
        return []
    size = chunk_bytes(manifest.model.decoder, images.max_patches, whole_scores=whole_scores)
    return [
        f"image attention bidirectional: an image is prefilled as one chunk, which takes about {size / 2**20:,.0f} MiB "
        f"for a moment at {images.max_patches} tokens"
    ]
