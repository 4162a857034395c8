"""The demo model's shape and its weights before training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig
from phisight.export.documents import SPECIAL_TOKENS, special_tokens
from phisight.export.names import EMBEDDINGS, HEAD, POSITION_TABLE, expected_tensors
from phisight.tasks.sizes import MAX_PATCHES, MIN_PATCHES
from phisight.training.labels import LABEL_OUTPUTS

__all__ = ["COORDINATES", "FIRST_COORDINATE", "LABEL_HEAD", "MODEL", "ORDINARY_TOKENS", "first_weights"]

COORDINATES = 101
"""Tokens 0.00, 0.01 ... 1.00."""
VOCABULARY = 832
ORDINARY_TOKENS = FIRST_COORDINATE = VOCABULARY - SPECIAL_TOKENS - COORDINATES
END_OF_TURN = FIRST_COORDINATE + COORDINATES + special_tokens().index("<|im_end|>")

MODEL = ModelConfig(
    DecoderConfig(
        hidden_size=256,  # rows of 256 and 512 fill the blocks of k-quants
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=VOCABULARY,
        context_length=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    ),
    VisionConfig(hidden_size=192, intermediate_size=512, num_layers=5, num_heads=4),
    ImageBudget(MIN_PATCHES, MAX_PATCHES),
    GenerationDefaults((END_OF_TURN,)),
)
LABEL_HEAD = ("labels.weight", "labels.bias")
"""Reads the patches' labels from the features. It exists in training only."""
TEXT_SIZE = 0.5
"""Root mean square of the embeddings at the start, which image tokens should have too."""


def first_weights(seed: int) -> dict[str, Tensor]:
    """Every weight that training changes, float32, by its name in the checkpoint, and LABEL_HEAD."""
    generator = torch.Generator().manual_seed(seed)
    assert MODEL.vision is not None
    shapes = {spec.name: spec.shape for spec in expected_tensors(MODEL).values() if spec.part != "unused"}
    width = MODEL.vision.hidden_size
    shapes |= dict(zip(LABEL_HEAD, ((LABEL_OUTPUTS, width), (LABEL_OUTPUTS,)), strict=True))
    return {name: _first(name, shape, generator) for name, shape in shapes.items()}


def _first(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name == POSITION_TABLE:
        return _sines(math.isqrt(shape[0]), shape[1])
    if len(shape) == 1:
        return torch.ones(shape)
    noise = torch.randn(shape, generator=generator)
    if name == EMBEDDINGS:
        noise *= TEXT_SIZE
        noise[FIRST_COORDINATE : FIRST_COORDINATE + COORDINATES] = _ordered_coordinates(shape[1], generator)
        return noise
    weights = noise * 0.7 * shape[1] ** -0.5
    if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
        weights *= 0.35  # what layers add starts small
    return weights * 0.5 if name == HEAD else weights


def _sines(side: int, width: int) -> Tensor:
    """(side * side, width): half of the width tells the row, half the column, with periods of 4 to 64 cells."""
    frequencies = 2 * math.pi / torch.logspace(math.log10(4), math.log10(64), width // 4)
    angles = torch.arange(side).float()[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width) * 0.5


def _ordered_coordinates(width: int, generator: torch.Generator) -> Tensor:
    """(COORDINATES, width): near coordinates start with similar embeddings."""
    ramp = torch.linspace(-1, 1, COORDINATES)[:, None]
    waves = torch.cat([f(ramp * k) for f in (torch.sin, torch.cos) for k in (1, 2, 4, 8)], 1)
    return waves @ torch.randn(8, width, generator=generator) * 0.8 * TEXT_SIZE
