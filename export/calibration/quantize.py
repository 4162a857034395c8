"""Quantising each layer as soon as its inputs are known, so that later layers are calibrated behind what it became."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from phisight.export.calibration.run import LayerInputs
from phisight.export.checkpoint import Checkpoint
from phisight.export.parallel import in_parallel, naming
from phisight.export.quantized import QuantizedWeights
from phisight.quant.blocks import Blocks, dequantize_blocks
from phisight.quant.methods.base import InputStatistics, Method
from phisight.quant.scheme import BlockScheme, Scheme

__all__ = ["LayerQuantizer", "shown_to_later_layers"]


class LayerQuantizer:
    """A consumer of calibration: quantises the weights that have block schemes, and keeps them.

    `follow` says whether later layers see the quantised weights. `notes` gathers what the method says of weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        method: Method,
        target: QuantizedWeights,
        *,
        follow: bool = True,
    ) -> None:
        self._checkpoint = checkpoint
        self._schemes = schemes
        self._method = method
        self._target = target
        self._follow = follow
        self.notes: list[str] = []

    def __call__(self, layer: LayerInputs) -> None:
        """Raises CheckpointError that names the weight."""
        for name in tuple(layer.statistics):
            statistics = layer.statistics.pop(name)
            scheme = self._schemes.get(name)
            if isinstance(scheme, BlockScheme):
                with naming(name):
                    self._quantize(name, scheme, statistics, layer)
            del statistics  # before the next Hessian is worked on

    def _quantize(self, name: str, scheme: BlockScheme, statistics: InputStatistics, layer: LayerInputs) -> None:
        source = self._checkpoint.tensors[name]
        quantizer = self._method.prepare(scheme, statistics)
        self.notes += [f"{name}: {note}" for note in quantizer.notes]
        parts = in_parallel(quantizer.quantize, source.chunks())
        if self._follow:
            parts = shown_to_later_layers(parts, name, layer)
        self._target.keep(name, source.shape, scheme, parts)


def shown_to_later_layers(parts: Iterator[Blocks], name: str, layer: LayerInputs) -> Iterator[Blocks]:
    """The parts of a weight as they come, each put in the weight's place if there are later layers."""
    at = 0
    for blocks in parts:
        if layer.advances:
            layer.replace(name, dequantize_blocks(blocks), at)
        at += len(blocks.q)
        yield blocks
