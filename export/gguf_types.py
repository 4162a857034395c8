"""Which ggml type each tensor of the decoder gets under a preset, as llama.cpp's quantiser chooses it.

The choices are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp for the architecture phi3: some
layers of the attention's input and of the feed-forward's output get more bits.
"""

from __future__ import annotations

import gguf

from phisight.errors import InputError

__all__ = ["PRESETS", "SIMPLE_TYPES", "fitting_type", "preset_type"]

SIMPLE_TYPES = ("F32", "F16", "BF16", "Q8_0")
"""Presets that give every matrix the same type, as a converter writes them."""

PRESETS: dict[str, tuple[str, str]] = {
    "F32": ("F32", "ALL_F32"),
    "F16": ("F16", "MOSTLY_F16"),
    "BF16": ("BF16", "MOSTLY_BF16"),
    "Q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "Q4_0": ("Q4_0", "MOSTLY_Q4_0"),
    "Q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "Q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "Q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "Q2_K": ("Q2_K", "MOSTLY_Q2_K"),
    "Q3_K_S": ("Q3_K", "MOSTLY_Q3_K_S"),
    "Q3_K_M": ("Q3_K", "MOSTLY_Q3_K_M"),
    "Q3_K_L": ("Q3_K", "MOSTLY_Q3_K_L"),
    "Q4_K_S": ("Q4_K", "MOSTLY_Q4_K_S"),
    "Q4_K_M": ("Q4_K", "MOSTLY_Q4_K_M"),
    "Q5_K_S": ("Q5_K", "MOSTLY_Q5_K_S"),
    "Q5_K_M": ("Q5_K", "MOSTLY_Q5_K_M"),
    "Q6_K": ("Q6_K", "MOSTLY_Q6_K"),
    "IQ3_S": ("IQ3_S", "MOSTLY_IQ3_S"),
    "IQ3_M": ("IQ3_S", "MOSTLY_IQ3_M"),
    "IQ4_NL": ("IQ4_NL", "MOSTLY_IQ4_NL"),
    "IQ4_XS": ("IQ4_XS", "MOSTLY_IQ4_XS"),
}
"""Preset -> (the type of most matrices, the name of its file type in gguf.LlamaFileType)."""

FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
"""What llama.cpp takes where rows are no multiple of 256."""


def preset_type(preset: str, name: str, *, layers: int, groups: int, imatrix: bool = False) -> str:
    """The type of the matrix `name` (GGUF's name) before `fitting_type`.

    `layers` is the decoder's depth, `groups` how many query heads share a key-value head, `imatrix` whether there is an
    importance matrix. Raises InputError.
    """
    if preset not in PRESETS:
        raise InputError(f"decoder is {preset!r}, wanted one of {', '.join(PRESETS).lower()} (case does not matter)")
    base = PRESETS[preset][0]
    if preset in SIMPLE_TYPES:
        return base
    if name == "output.weight":
        return "Q6_K"
    if name == "token_embd.weight":
        return base
    layer = int(name.split(".")[1])
    if ".attn_qkv." in name:
        return _attention_input(preset, base, layer, layers, groups)
    if ".ffn_down." in name:
        return _feed_forward_output(preset, base, layer, layers, imatrix)
    if ".attn_output." in name:
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(preset, base)
    return base


def fitting_type(name: str, columns: int) -> str:
    """The type itself, or what llama.cpp falls back to where a row of `columns` is no multiple of its block."""
    for candidate in (name, FALLBACKS.get(name, name)):
        if columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[candidate]][0] == 0:
            return candidate
    return "F16"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _attention_input(preset: str, base: str, layer: int, layers: int, groups: int) -> str:
    match preset:
        case "Q2_K":
            return "Q4_K" if groups >= 4 else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if layer < 4 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _more_bits(layer, layers) else base
        case "IQ3_S":
            return "Q4_K" if groups >= 4 else base
        case "IQ3_M":
            return "Q4_K"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if groups >= 4 else base
    return base


def _feed_forward_output(preset: str, base: str, layer: int, layers: int, imatrix: bool) -> str:
    first = layer < layers // 8
    match preset:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if first else base
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if first and not imatrix else base
        case "Q5_0":
            return "Q5_1" if first and imatrix else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _more_bits(layer, layers) else base
        case "IQ3_M":
            return "Q4_K" if first else base
    return base
