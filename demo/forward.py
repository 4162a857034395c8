"""The architecture's forward pass in PyTorch, float32: tower, projector, decoder. What the reference computes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from phisight.config import DecoderConfig, ModelConfig, VisionConfig
from phisight.export.names import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    PATCH_EMBEDDING,
    POSITION_TABLE,
    PROJECTOR,
    decoder_layer,
    vision_layer,
)
from phisight.tasks.sizes import Grid

__all__ = ["Weights", "decode", "embed", "encode", "logits", "project", "prompt_logits"]

Weights = dict[str, Tensor]


def encode(weights: Weights, config: VisionConfig, patches: Tensor, grid: Grid) -> Tensor:
    """Patches (pictures, rows * columns, 768) of one grid -> features (pictures, patches, width)."""
    x = _affine(weights, PATCH_EMBEDDING, patches) + _positions(weights[POSITION_TABLE], grid)
    for index in range(config.used_layers):
        layer = vision_layer(index)
        attention = layer + "self_attn."
        h = _layer_norm(weights, layer + "layer_norm1", x, config.layer_norm_eps)
        names = [f"{attention}{name}_proj" for name in "qkv"]
        stacked = (torch.cat([weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias"))
        q, k, v = (_heads(t, config.num_heads) for t in F.linear(h, *stacked).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + _affine(weights, attention + "out_proj", mixed)
        h = _layer_norm(weights, layer + "layer_norm2", x, config.layer_norm_eps)
        h = F.gelu(_affine(weights, layer + "mlp.fc1", h), approximate="tanh")
        x = x + _affine(weights, layer + "mlp.fc2", h)
    return x


def project(weights: Weights, features: Tensor) -> Tensor:
    """Features (..., width of the tower) -> image tokens (..., width of the decoder)."""
    return _affine(weights, PROJECTOR[1], F.gelu(_affine(weights, PROJECTOR[0], features)))


def embed(weights: Weights, ids: Tensor) -> Tensor:
    return F.embedding(ids, weights[EMBEDDINGS])


def decode(
    weights: Weights,
    config: DecoderConfig,
    x: Tensor,
    positions: Tensor,
    mask: Tensor,
    wanted: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Embeddings (rows, length, width), positions (rows, length), mask (rows, 1, length, length) that is added to the
    scores -> normed hidden states: all of them (rows, length, width) or, at `wanted` rows and places, (wanted, width).
    """
    cosines, sines = _rotation(positions, config)
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    for index in range(config.num_layers):
        layer = decoder_layer(index)
        h = _rms_norm(x, weights[layer + "input_layernorm.weight"], config.rms_norm_eps)
        qkv = F.linear(h, weights[layer + "self_attn.qkv_proj.weight"])
        q, k, v = (
            part.unflatten(-1, (-1, size)).transpose(1, 2)
            for part in qkv.split([heads * size, groups * size, groups * size], -1)
        )
        q, k = (_rotate(part, cosines, sines) for part in (q, k))
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if wanted is not None and index == config.num_layers - 1:
            x, mixed = x[wanted], mixed[wanted]  # what nobody reads is not computed: a tenth of a step
        x = x + F.linear(mixed, weights[layer + "self_attn.o_proj.weight"])
        h = _rms_norm(x, weights[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = F.linear(h, weights[layer + "mlp.gate_up_proj.weight"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
    return _rms_norm(x, weights[FINAL_NORM], config.rms_norm_eps)


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    return F.linear(hidden, weights[HEAD])


def prompt_logits(weights: Weights, model: ModelConfig, ids: Tensor, pictures: list[tuple[Tensor, Grid]]) -> Tensor:
    """Logits (length, vocabulary) of one prompt in which negative ids are image slots, in the order of `pictures`."""
    assert model.vision is not None
    x = embed(weights, ids.clamp_min(0))
    tokens = [project(weights, encode(weights, model.vision, patches[None], grid))[0] for patches, grid in pictures]
    if tokens:
        x = x.masked_scatter((ids < 0)[:, None], torch.cat(tokens))
    length = len(ids)
    mask = torch.full((length, length), -math.inf).triu(1)[None, None]
    return logits(weights, decode(weights, model.decoder, x[None], torch.arange(length)[None], mask)[0])


def _affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])


def _layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(pictures, length, width) -> (pictures, heads, length, width of a head)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _positions(table: Tensor, grid: Grid) -> Tensor:
    """The square table resized to a grid as SigLIP2 does: (rows * columns, width)."""
    side = math.isqrt(len(table))
    square = table.view(side, side, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(square, grid, mode="bilinear", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).reshape(grid[0] * grid[1], -1)


def _rotation(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (rows, 1, length, width of a head); the sines of the first half are negative."""
    size = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2).float() / size)
    angles = (positions[..., None].float() * frequencies)[:, None]
    return torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return x * cosines + x.roll(x.shape[-1] // 2, -1) * sines


class _RmsNorm(torch.autograd.Function):
    """x / rms(x), with a backward pass of few temporaries: a quarter of the time of the composed one on a CPU."""

    @staticmethod
    def forward(ctx: object, x: Tensor, eps: float) -> Tensor:
        rate = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = x * rate
        ctx.save_for_backward(y, rate)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        y, rate = ctx.saved_tensors  # type: ignore[attr-defined]
        mean = (gradient * y).mean(-1, keepdim=True)
        return torch.addcmul(gradient, y, mean, value=-1).mul_(rate), None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x, eps) * weight
