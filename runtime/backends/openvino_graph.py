"""The decoder graph as OpenVINO reads it, with attention put in words that its engines fuse.

    inputs_embeds (1, n, hidden) float32, num_logits (1,) int64: as in decoder.onnx
    positions (n,) int64: of the new tokens
    mask (1, 1, n, m) float32: 0 or -inf, m being the places in the cache, the n new ones last
    beam_idx (1,) int32: always [0], which the fused form wants
    -> logits (1, num_logits, vocab) float32

GroupQueryAttention as it is read gives the whole cache back in new memory at each run. Here the cache is a variable of
the infer request, (1, kv_heads, places, head_dim) float32, named key.{i} and value.{i}. The pattern is that of
https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from phisight.errors import InputError

__all__ = ["variable_names", "with_state"]

COSINES, SINES = 7, 8
"""Inputs of GroupQueryAttention as OpenVINO reads it, behind q, k, v, the past and two lengths."""


def variable_names(num_layers: int) -> list[str]:
    """The cache's variables, in the order in which a saved state has them."""
    return [f"{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]


def with_state(ov: Any, model: Any) -> Any:
    """The graph of a decoder.onnx, which is used up. Raises InputError for one that has no plain causal attention."""
    ops = import_module("openvino.opset15")
    positions = _parameter(ov, ops, "positions", [-1], "i64")
    mask = _parameter(ov, ops, "mask", [1, 1, -1, -1], "f32")
    beam = _parameter(ov, ops, "beam_idx", [1], "i32")
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupQueryAttention"]
    if not attentions:
        raise InputError(
            "OpenVINO reads decoders with causal attention only: export without --image-attention bidirectional "
            "(with OpenVINO such a model can be run either way), or take --device cpu"
        )
    zero = ops.constant(np.int64(0))
    rotation: tuple[Any, Any] | None = None
    sinks: list[Any] = []
    for index, node in enumerate(attentions):
        inputs = [entry.get_source_output() for entry in node.inputs()]
        if rotation is None:
            cosines, sines = (ops.gather(inputs[at], positions, zero) for at in (COSINES, SINES))
            rotation = cosines, sines
        query, key = (_rotated(ops, x, *rotation) for x in inputs[:2])
        group = node.get_attributes()["num_heads"] // node.get_attributes()["kv_num_heads"]
        expanded = []
        for kind, new, past in (("key", key, inputs[3]), ("value", inputs[2], inputs[4])):
            _, heads, _, width = past.get_partial_shape()
            shape = [1, heads.get_length(), -1, width.get_length()]
            empty = ops.constant(np.zeros((1, shape[1], 0, shape[3]), np.float32))
            name = f"{kind}.{index}"
            kept = ops.read_value(empty, name, ov.Type.f32, ov.PartialShape(shape))
            whole = ops.concat([ops.gather(kept, beam, zero), new], 2)
            sinks.append(ops.assign(whole, name))
            expanded.append(_repeated(ops, whole, shape[1], group, shape[3]))
        mixed = ops.scaled_dot_product_attention(query, *expanded, mask)
        mixed = ops.transpose(mixed, ops.constant(np.array([0, 2, 1, 3])))
        mixed = ops.reshape(mixed, ops.constant(np.array([0, 0, -1])), True)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(mixed.output(0))
    logits = [result for result in model.get_results() if "logits" in result.input(0).get_source_output().get_names()]
    kept_inputs = [p for p in model.get_parameters() if p.output(0).any_name in ("inputs_embeds", "num_logits")]
    return ov.Model(logits, sinks, [*kept_inputs, positions, mask, beam], "decoder")


def _parameter(ov: Any, ops: Any, name: str, shape: list[int], dtype: str) -> Any:
    parameter = ops.parameter(ov.PartialShape(shape), getattr(ov.Type, dtype), name=name)
    parameter.output(0).set_names({name})
    return parameter


def _rotated(ops: Any, x: Any, cosines: Any, sines: Any) -> Any:
    """Half-split heads (1, heads, n, head_dim) turned by angles (n, head_dim / 2)."""
    halves = ops.split(x, ops.constant(np.int64(-1)), 2)
    a, b = halves.output(0), halves.output(1)
    turned = (
        ops.subtract(ops.multiply(a, cosines), ops.multiply(b, sines)),
        ops.add(ops.multiply(b, cosines), ops.multiply(a, sines)),
    )
    return ops.concat(list(turned), -1)


def _repeated(ops: Any, x: Any, heads: int, group: int, width: int) -> Any:
    """Each of (1, heads, m, width) `group` times: what the fused attention recognises as grouped heads."""
    x = ops.unsqueeze(x, ops.constant(np.int64(2)))
    x = ops.broadcast(x, ops.constant(np.array([1, 1, group, 1, 1])), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(x, ops.constant(np.array([0, heads * group, -1, width])), True)
