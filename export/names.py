"""Every tensor of a checkpoint: its name, shape, the part of the model that it belongs to, and its name in a GGUF.

Names and shapes are those of the official checkpoint (695 tensors for the 15B model).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from phisight.config import DecoderConfig, ModelConfig, VisionConfig

__all__ = [
    "EMBEDDINGS",
    "FINAL_NORM",
    "HEAD",
    "PATCH_EMBEDDING",
    "POSITION_TABLE",
    "PROJECTOR",
    "VISION",
    "Part",
    "TensorSpec",
    "decoder_layer",
    "expected_tensors",
    "gguf_name",
    "vision_layer",
]

Part = Literal["decoder", "embeddings", "head", "vision", "projector", "unused"]

VISION = "model.vision_tower.vision_tower.vision_model."
EMBEDDINGS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
PATCH_EMBEDDING = VISION + "embeddings.patch_embedding"
POSITION_TABLE = VISION + "embeddings.position_embedding.weight"
PROJECTOR = ("model.mm_projector.0", "model.mm_projector.2")


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under `name`. Parts of `unused` are known, checked and left out."""

    name: str
    shape: tuple[int, ...]
    part: Part

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


GGUF_DECODER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_VISION_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
GGUF_NAMES = {
    EMBEDDINGS: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
    POSITION_TABLE: "v.position_embd.weight",
}
"""llama.cpp's names (https://github.com/ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py)."""


def gguf_name(name: str) -> str:
    """The name of a used tensor in a GGUF file: the text file's, or the mmproj's for tower and projector."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    stem, _, kind = name.rpartition(".")
    if stem == PATCH_EMBEDDING:
        return f"v.patch_embd.{kind}"
    if stem in PROJECTOR:
        return f"mm.{stem.rsplit('.', 1)[1]}.{kind}"
    tower = name.startswith(VISION)
    index, _, inner = stem.partition("layers.")[2].partition(".")
    table = GGUF_VISION_LAYER if tower else GGUF_DECODER_LAYER
    return f"{'v.blk' if tower else 'blk'}.{index}.{table[inner]}.{kind}"


def decoder_layer(index: int) -> str:
    """Prefix of a decoder layer's tensors."""
    return f"model.layers.{index}."


def vision_layer(index: int) -> str:
    """Prefix of a vision layer's tensors."""
    return f"{VISION}encoder.layers.{index}."


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """All tensors of a checkpoint of this configuration, by name."""
    specs = list(_decoder(config.decoder))
    if config.vision is not None:
        specs += _vision(config.vision)
        specs += _projector(config.vision, config.decoder)
    return {spec.name: spec for spec in specs}


def _decoder(c: DecoderConfig) -> Iterator[TensorSpec]:
    yield TensorSpec(EMBEDDINGS, (c.vocab_size, c.hidden_size), "embeddings")
    for i in range(c.num_layers):
        layer = decoder_layer(i)
        yield TensorSpec(layer + "input_layernorm.weight", (c.hidden_size,), "decoder")
        yield TensorSpec(layer + "self_attn.qkv_proj.weight", (c.qkv_size, c.hidden_size), "decoder")
        yield TensorSpec(layer + "self_attn.o_proj.weight", (c.hidden_size, c.hidden_size), "decoder")
        yield TensorSpec(layer + "post_attention_layernorm.weight", (c.hidden_size,), "decoder")
        yield TensorSpec(layer + "mlp.gate_up_proj.weight", (2 * c.intermediate_size, c.hidden_size), "decoder")
        yield TensorSpec(layer + "mlp.down_proj.weight", (c.hidden_size, c.intermediate_size), "decoder")
    yield TensorSpec(FINAL_NORM, (c.hidden_size,), "decoder")
    yield TensorSpec(HEAD, (c.vocab_size, c.hidden_size), "head")


def _vision(c: VisionConfig) -> Iterator[TensorSpec]:
    yield TensorSpec(PATCH_EMBEDDING + ".weight", (c.hidden_size, c.patch_dim), "vision")
    yield TensorSpec(PATCH_EMBEDDING + ".bias", (c.hidden_size,), "vision")
    yield TensorSpec(POSITION_TABLE, (c.table_side**2, c.hidden_size), "vision")
    for i in range(c.num_layers):
        part: Part = "vision" if i < c.used_layers else "unused"
        layer = vision_layer(i)
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _affine(layer + norm, (c.hidden_size,), part)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}self_attn.{name}", (c.hidden_size, c.hidden_size), part)
        yield from _affine(layer + "mlp.fc1", (c.intermediate_size, c.hidden_size), part)
        yield from _affine(layer + "mlp.fc2", (c.hidden_size, c.intermediate_size), part)
    yield from _affine(VISION + "post_layernorm", (c.hidden_size,), "unused")
    head = VISION + "head."
    yield TensorSpec(head + "probe", (1, 1, c.hidden_size), "unused")
    yield TensorSpec(head + "attention.in_proj_weight", (3 * c.hidden_size, c.hidden_size), "unused")
    yield TensorSpec(head + "attention.in_proj_bias", (3 * c.hidden_size,), "unused")
    yield from _affine(head + "attention.out_proj", (c.hidden_size, c.hidden_size), "unused")
    yield from _affine(head + "layernorm", (c.hidden_size,), "unused")
    yield from _affine(head + "mlp.fc1", (c.intermediate_size, c.hidden_size), "unused")
    yield from _affine(head + "mlp.fc2", (c.hidden_size, c.intermediate_size), "unused")


def _projector(vision: VisionConfig, decoder: DecoderConfig) -> Iterator[TensorSpec]:
    yield from _affine(PROJECTOR[0], (decoder.hidden_size, vision.hidden_size), "projector")
    yield from _affine(PROJECTOR[1], (decoder.hidden_size, decoder.hidden_size), "projector")


def _affine(name: str, shape: tuple[int, ...], part: Part) -> Iterator[TensorSpec]:
    """A weight and its bias, which has one value per row of the weight."""
    yield TensorSpec(name + ".weight", shape, part)
    yield TensorSpec(name + ".bias", shape[:1], part)
