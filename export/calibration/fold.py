"""AWQ on a decoder layer: channel scales found for each linear layer's inputs, and folded into what makes these inputs.

    input norm            -> qkv      the norm's weight is divided by the scales
    rows of v in qkv      -> o        divided likewise; heads that share a key-value head share their scales
    post-attention norm   -> gate_up
    rows of up in gate_up -> down
    final norm            -> head

The model computes the same as before, up to rounding; what is rounded are the scaled weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from phisight.config import DecoderConfig
from phisight.export.calibration.quantize import shown_to_later_layers
from phisight.export.calibration.run import LayerInputs
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import FINAL_NORM, HEAD, decoder_layer
from phisight.export.parallel import in_parallel, naming
from phisight.export.quantized import QuantizedWeights
from phisight.quant.methods.awq import SAMPLE, Awq, search_channel_scales
from phisight.quant.methods.base import InputStatistics, Method
from phisight.quant.scheme import BlockScheme, Scheme

__all__ = ["AwqQuantizer", "Folding"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Folding:
    """What becomes of the linear layer `weight`: columns are multiplied by `columns`, rows by `rows`."""

    weight: str
    columns: Floats
    rows: Floats

    def apply(self, weights: Floats, start: int = 0) -> Floats:
        """Rows of the weight from row `start` on, folded."""
        folded: Floats = weights * self.columns * self.rows[start : start + len(weights), None]
        return folded


class AwqQuantizer:
    """A consumer of calibration, as `LayerQuantizer`, that scales channels before `method` quantises."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        target: QuantizedWeights,
        method: Method | None = None,
        *,
        follow: bool = True,
    ) -> None:
        """`method` is the clipping search of `Awq` unless given."""
        self._checkpoint = checkpoint
        self._schemes = schemes
        self._target = target
        self._method = method or Awq()
        self._follow = follow
        self.notes: list[str] = []

    def __call__(self, layer: LayerInputs) -> None:
        """Raises CheckpointError that names the weight."""
        scales = {}
        for name, statistics in layer.statistics.items():
            if isinstance(scheme := self._schemes.get(name), BlockScheme):
                with naming(name):
                    scales[name] = self._scales(name, scheme, statistics)
        if not scales:
            return
        prefix = decoder_layer(layer.index)
        norms = {
            prefix + "self_attn.qkv_proj.weight": prefix + "input_layernorm.weight",
            prefix + "mlp.gate_up_proj.weight": prefix + "post_attention_layernorm.weight",
            HEAD: FINAL_NORM,
        }
        for name in scales:
            if name in norms:
                self._fold_norm(norms[name], scales[name], layer)
        for folding in self._foldings(prefix, scales):
            statistics = layer.statistics.pop(folding.weight)
            with naming(folding.weight):
                self._quantize(folding, statistics, layer)
            del statistics  # before the next Hessian is worked on

    def _scales(self, name: str, scheme: BlockScheme, statistics: InputStatistics) -> Floats:
        """Scales of a layer's input channels, judged on rows spread over its weight."""
        source = self._checkpoint.tensors[name]
        step = -(-source.shape[0] // SAMPLE)
        sample = np.concatenate([source.rows(row, row + 1) for row in range(0, source.shape[0], step)])
        if not name.endswith("o_proj.weight"):
            return search_channel_scales([sample], scheme, statistics).scale
        tied = partial(_tied, decoder=self._checkpoint.config.decoder)
        return search_channel_scales([sample], scheme, statistics, admit=tied).scale

    def _fold_norm(self, norm: str, scale: Floats, layer: LayerInputs) -> None:
        vector = self._checkpoint.tensors[norm].load() / scale
        self._target.keep_vector(norm, vector)
        if self._follow and layer.advances:
            layer.replace(norm, vector, 0)

    def _foldings(self, prefix: str, scales: Mapping[str, Floats]) -> Iterator[Folding]:
        decoder = self._checkpoint.config.decoder
        for name, columns in scales.items():
            rows = np.ones(self._checkpoint.tensors[name].shape[0], np.float32)
            if name.endswith("qkv_proj.weight"):
                shared = scales[prefix + "self_attn.o_proj.weight"].reshape(decoder.num_kv_heads, -1, decoder.head_dim)
                rows[-decoder.num_kv_heads * decoder.head_dim :] = 1 / shared[:, 0].reshape(-1)
            elif name.endswith("gate_up_proj.weight"):
                rows[decoder.intermediate_size :] = 1 / scales[prefix + "mlp.down_proj.weight"]
            yield Folding(name, columns, rows)

    def _quantize(self, folding: Folding, statistics: InputStatistics, layer: LayerInputs) -> None:
        name = folding.weight
        source, scheme = self._checkpoint.tensors[name], self._schemes[name]
        assert isinstance(scheme, BlockScheme)
        statistics = statistics.scaled((1 / folding.columns).astype(np.float32), in_place=True)
        quantizer = self._method.prepare(scheme, statistics)
        self.notes += [f"{name}: {note}" for note in quantizer.notes]

        def folded() -> Iterator[Floats]:
            at = 0
            for chunk in source.chunks():
                yield folding.apply(chunk, at)
                at += len(chunk)

        parts = in_parallel(quantizer.quantize, folded())
        if self._follow:
            parts = shown_to_later_layers(parts, name, layer)
        self._target.keep(name, source.shape, scheme, parts)


def _tied(scale: Floats, decoder: DecoderConfig) -> Floats:
    """Geometric means over the query heads that share a key-value head, (hidden,)."""
    shared = scale.reshape(decoder.num_kv_heads, -1, decoder.head_dim)
    mean = np.exp(np.log(shared).mean(axis=1, keepdims=True))
    tied: Floats = np.broadcast_to(mean, shared.shape).reshape(-1).astype(np.float32)
    return tied
