"""What GGUF files say of the model beside its weights: architecture, tokenizer, template, our own provenance.

Keys and values are those that llama.cpp's converter writes for this model
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names them); ours begin with `phisight.`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf

from phisight.chat_template import read_chat_template
from phisight.config import ModelConfig, VisionConfig
from phisight.errors import TokenizerError
from phisight.export.gguf_plan import GgufPlan
from phisight.export.gguf_types import PRESETS

__all__ = ["add_text_metadata", "add_vision_metadata"]

INERT_MERGE = "\u00c0 \u00c1"
"""Stands for the bytes C0 and C1, which occur in no UTF-8. llama.cpp refuses a tokenizer without any merge."""

QUANTIZATION_VERSION = 2


def add_text_metadata(writer: gguf.GGUFWriter, directory: Path, config: ModelConfig, plan: GgufPlan) -> None:
    """The text file's metadata. `directory` is the checkpoint's. Raises TokenizerError."""
    d = config.decoder
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(directory.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[PRESETS[plan.options.decoder][1]])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_context_length(d.context_length)
    writer.add_rope_scaling_orig_ctx_len(d.context_length)
    writer.add_embedding_length(d.hidden_size)
    writer.add_feed_forward_length(d.intermediate_size)
    writer.add_block_count(d.num_layers)
    writer.add_head_count(d.num_heads)
    writer.add_head_count_kv(d.num_kv_heads)
    writer.add_layer_norm_rms_eps(d.rms_norm_eps)
    writer.add_rope_dimension_count(d.head_dim)
    writer.add_rope_freq_base(d.rope_theta)
    writer.add_sliding_window(0)
    _add_tokenizer(writer, directory, config)
    template = read_chat_template(directory)
    if template is not None:
        writer.add_chat_template(template)
    _add_provenance(writer, plan)
    writer.add_float32("phisight.generation.temperature", config.generation.temperature)
    writer.add_float32("phisight.generation.top_p", config.generation.top_p)


def add_vision_metadata(writer: gguf.GGUFWriter, config: ModelConfig, plan: GgufPlan, vision: VisionConfig) -> None:
    """The mmproj's metadata.

    `image_min_pixels` is one patch: a picture that was sized already passes unchanged. The model's own budget stands
    under keys of ours.
    """
    area = vision.patch_size**2
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType[PRESETS[plan.options.vision][1]])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("phi4")
    writer.add_vision_projection_dim(config.decoder.hidden_size)
    writer.add_vision_image_size(vision.table_side * vision.patch_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.used_layers)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(True)
    writer.add_vision_min_pixels(area)
    budget = config.images
    if budget is not None:
        writer.add_vision_max_pixels(budget.max_patches * area)
        writer.add_uint32("phisight.image.min_patches", budget.min_patches)
        writer.add_uint32("phisight.image.max_patches", budget.max_patches)
    _add_provenance(writer, plan)


def _add_provenance(writer: gguf.GGUFWriter, plan: GgufPlan) -> None:
    writer.add_string("phisight.version", version("phisight"))
    writer.add_string("phisight.options", json.dumps(plan.options.as_json()))
    if (matrix := plan.options.imatrix) is not None:  # as llama-quantize tells it
        writer.add_string("quantize.imatrix.dataset", "; ".join(matrix.datasets))
        writer.add_uint32("quantize.imatrix.entries_count", len(matrix.weights))
        writer.add_uint32("quantize.imatrix.chunks_count", matrix.chunk_count)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: ModelConfig) -> None:
    """Byte-level BPE with cl100k's split pattern, which llama.cpp calls `gpt2` with the pre-tokenizer `dbrx`."""
    path = directory / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model, added = data["model"], {int(t["id"]): t for t in data["added_tokens"]}
        vocab = {int(id_): token for token, id_ in model["vocab"].items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} is no byte-level BPE tokenizer ({error!r}): download it again") from None
    size = config.decoder.vocab_size
    beyond = [id_ for id_ in (*vocab, *added) if id_ >= size]
    if beyond:
        raise TokenizerError(f"{path} has the token id {max(beyond)}, but config.json a vocabulary of {size}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")
    writer.add_token_list([_token(id_, vocab, added) for id_ in range(size)])
    writer.add_token_types([_token_type(id_, vocab, added) for id_ in range(size)])
    writer.add_token_merges(merges or [INERT_MERGE])
    _add_special_ids(writer, directory, config, {t["content"]: id_ for id_, t in added.items()})
    for side in ("lstrip", "rstrip"):
        ids = sorted(id_ for id_, token in added.items() if token.get(side))
        if ids:
            writer.add_array(f"phisight.tokenizer.{side}", ids)


def _token(id_: int, vocab: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> str:
    if id_ in added:
        return str(added[id_]["content"])
    return vocab.get(id_, f"[PAD{id_}]")


def _token_type(id_: int, vocab: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> gguf.TokenType:
    if id_ in added:
        content = added[id_]["content"]
        special = added[id_].get("special") or (content.startswith("<|") and content.endswith("|>"))
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.NORMAL if id_ in vocab else gguf.TokenType.UNUSED


def _add_special_ids(writer: gguf.GGUFWriter, directory: Path, config: ModelConfig, ids: Mapping[str, int]) -> None:
    """The ids of tokenizer_config.json's special tokens; the end token also from the model's own settings."""
    path = directory / "tokenizer_config.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def id_of(key: str) -> int | None:
        entry = names.get(key)
        return ids.get(str(entry["content"] if isinstance(entry, dict) else entry))

    bos, unknown, pad = id_of("bos_token"), id_of("unk_token"), id_of("pad_token")
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_eos_token_id(config.generation.eos_token_ids[0])
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
