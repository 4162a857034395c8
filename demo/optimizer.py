"""Muon for matrices, Adam for the rest, on flat buffers that processes share.

Muon: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (the momentum's nearest orthogonal matrix, by five
Newton-Schulz steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phisight.export.names import EMBEDDINGS, HEAD, POSITION_TABLE
from phisight.training.architecture import LABEL_HEAD, MODEL

__all__ = ["Buffers", "Slot", "slots", "update"]

MOMENTUM = 0.95
WEIGHT_DECAY = 0.02
ADAM_RATE = 0.15
"""Adam's rate as a share of Muon's."""
POSITION_RATE = 0.05
ADAM_BETAS = (0.9, 0.98)
QUERY_KEY_BOUND = 1.5
"""Most that the weights of a head's queries or keys may have as root mean square times the root of their width.

Beyond it attention saturates and learns nothing new; the architecture has no norm on them that would prevent it."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the flat buffers, and which process updates it."""

    name: str
    shape: tuple[int, ...]
    start: int
    owner: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def uses_muon(self) -> bool:
        return len(self.shape) == 2 and self.name not in (EMBEDDINGS, HEAD, POSITION_TABLE, *LABEL_HEAD)

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.end].view(self.shape)


@dataclass(frozen=True)
class Buffers:
    """Shared between processes; all flat float32. `gradients` has a row for each process."""

    weights: Tensor
    gradients: Tensor
    momentum: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, size: int, processes: int) -> Buffers:
        def shared(*shape: int) -> Tensor:
            return torch.zeros(shape).share_memory_()

        return cls(shared(size), shared(processes, size), shared(size), shared(size))


def slots(shapes: Mapping[str, tuple[int, ...]], processes: int) -> tuple[Slot, ...]:
    """Places of all tensors, shared out so that each process has about as much to update."""
    load = [0.0] * processes
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -math.prod(item[1])):
        owners[name] = load.index(min(load))
        load[owners[name]] += math.prod(shape) * (min(shape) if len(shape) == 2 else 8)
    placed, start = [], 0
    for name, shape in shapes.items():
        placed.append(Slot(name, tuple(shape), start, owners[name]))
        start = placed[-1].end
    return tuple(placed)


@torch.no_grad()
def update(buffers: Buffers, mine: Iterable[tuple[Slot, float]], step: int) -> None:
    """One step for tensors with their rates; `step` counts from 1 since the moments were zero."""
    for slot, rate in mine:
        gradient = buffers.gradients[:, slot.start : slot.end].mean(0)
        weights, momentum = buffers.weights[slot.start : slot.end], buffers.momentum[slot.start : slot.end]
        if slot.uses_muon:
            momentum.mul_(MOMENTUM).add_(gradient)
            direction = gradient.add_(momentum, alpha=MOMENTUM).view(slot.shape)
            turned = [
                _orthogonal(part) * max(1.0, part.shape[0] / part.shape[1]) ** 0.5 for part in _parts(slot, direction)
            ]
            weights.mul_(1 - rate * WEIGHT_DECAY).add_(torch.cat(turned).reshape(-1), alpha=-rate)
            if slot.name.endswith("qkv_proj.weight"):
                _bound_queries_and_keys(weights.view(slot.shape))
        else:
            second = buffers.second[slot.start : slot.end]
            first_beta, second_beta = ADAM_BETAS
            momentum.mul_(first_beta).add_(gradient, alpha=1 - first_beta)
            second.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
            scale = (second / (1 - second_beta**step)).sqrt_().add_(1e-10)
            share = POSITION_RATE if slot.name == POSITION_TABLE else ADAM_RATE
            weights.addcdiv_(momentum / (1 - first_beta**step), scale, value=-rate * share)


def _parts(slot: Slot, matrix: Tensor) -> tuple[Tensor, ...]:
    """Fused matrices are updated piece by piece."""
    decoder = MODEL.decoder
    if slot.name.endswith("qkv_proj.weight"):
        groups = decoder.num_kv_heads * decoder.head_dim
        return matrix.split([decoder.hidden_size, groups, groups])
    if slot.name.endswith("gate_up_proj.weight"):
        return matrix.chunk(2)
    return (matrix,)


def _orthogonal(matrix: Tensor) -> Tensor:
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def _bound_queries_and_keys(qkv: Tensor) -> None:
    decoder = MODEL.decoder
    heads = qkv[: (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim].unflatten(0, (-1, decoder.head_dim))
    size = heads.square().mean((1, 2), keepdim=True).sqrt() * decoder.hidden_size**0.5
    heads.mul_((QUERY_KEY_BOUND / size).clamp_max(1.0))
