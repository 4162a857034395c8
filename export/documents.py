"""The JSON documents of a checkpoint directory, in the official checkpoint's form: for checkpoints that we make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phisight.config import GenerationDefaults, ImageBudget, ModelConfig

__all__ = [
    "SPECIAL_TOKENS",
    "config_document",
    "generation_document",
    "preprocessor_document",
    "special_tokens",
    "tokenizer_document",
]

SPECIAL_TOKENS = 96
DUMMIES = 86

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where cl100k splits text: https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py"""
FLAGS = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def config_document(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model with a vision tower."""
    decoder, vision = model.decoder, model.vision
    assert vision is not None
    return {
        "architectures": ["Phi4ForCausalLMV"],
        "model_type": "phi4-siglip",
        "dtype": "bfloat16",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.context_length,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": decoder.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "eos_token_id": model.generation.eos_token_ids[0],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.hidden_size,
        "use_mm_proj": True,
        "use_s2": False,
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
        },
    }


def generation_document(generation: GenerationDefaults) -> dict[str, Any]:
    """generation_config.json."""
    return {
        "eos_token_id": list(generation.eos_token_ids),
        "do_sample": True,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
    }


def preprocessor_document(budget: ImageBudget) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "min_num_patches": budget.min_patches,
        "max_num_patches": budget.max_patches,
        "patch_size": 16,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def tokenizer_document(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]] = (), words: Sequence[str] = ()
) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, then `words` as tokens of their own, then the special tokens."""
    ordinary = len(vocab)
    whole = [
        {"id": ordinary + i, "content": word, **FLAGS, "lstrip": False, "rstrip": False, "special": False}
        for i, word in enumerate(words)
    ]
    special = [
        {"id": ordinary + len(words) + i, "content": name, **FLAGS, "special": not name.endswith("think>")}
        for i, name in enumerate(special_tokens())
    ]
    return {
        "version": "1.0",
        "added_tokens": whole + special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True},
                BYTE_LEVEL,
            ],
        },
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": [list(pair) for pair in merges]},
    }


def special_tokens() -> list[str]:
    """Phi-4's special tokens in the order of their ids, 100256 to 100351 in the real tokenizer."""
    dummies = [f"<|dummy_{i}|>" for i in range(DUMMIES)]
    middle = [f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix")]
    turns = ["<|im_start|>", "<|im_end|>", "<|im_sep|>"]
    return [
        dummies[0],
        "<|endoftext|>",
        *middle,
        *dummies[1:4],
        *turns,
        *dummies[4:13],
        "<|endofprompt|>",
        *dummies[13:],
        "<think>",
        "</think>",
    ]
