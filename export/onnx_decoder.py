"""The decoder graph: embeddings of new positions -> logits, with the KV cache updated in place.

    inputs_embeds (1, n, hidden) float32, seqlens_k (1,) int32 = positions in all - 1,
    total_sequence_length () int32 = positions in all, num_logits (1,) int64 = positions that get logits,
    past.{i}.key / .value (1, kv_heads, capacity, head_dim) for every layer
    -> logits (1, num_logits, vocab) float32, present.{i}.key / .value, to be bound to the same memory as past

With `--image-attention bidirectional` there is one more input, bidirectional () bool: whether the new positions all see
each other, as those of an image do, or only what is before them.

Phi-3 architecture (https://arxiv.org/abs/2404.14219): RMS norms, fused qkv and gate_up projections, grouped-query
attention, rotation of half-split heads. Operators of ONNX Runtime:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phisight.config import DecoderConfig
from phisight.export.names import FINAL_NORM, HEAD, decoder_layer
from phisight.export.onnx_graph import DTYPES, GraphBuilder
from phisight.export.onnx_layers import LayerBuilder, WeightJob
from phisight.export.plan import Plan

__all__ = ["add_and_norm", "attention", "build_decoder", "feed_forward", "rotation_tables"]


def build_decoder(config: DecoderConfig, plan: Plan, data_file: str) -> tuple[GraphBuilder, list[WeightJob]]:
    """The graph and the jobs that fill its data file."""
    graph = GraphBuilder("decoder", data_file)
    layers = LayerBuilder(graph, plan, plan.options.float_type)
    x = graph.input("inputs_embeds", "float32", [1, "positions", config.hidden_size])
    lengths = graph.input("seqlens_k", "int32", [1]), graph.input("total_sequence_length", "int32", [])
    count = graph.input("num_logits", "int64", [1])
    if layers.dtype != "float32":
        x = layers.cast(x, layers.dtype)
    rotation = rotation_tables(layers, config)
    bidirectional = None
    if plan.options.image_attention == "bidirectional":
        bidirectional = graph.input("bidirectional", "bool", [])

    normed = graph.node(
        "SimplifiedLayerNormalization",
        [x, layers.vector(decoder_layer(0) + "input_layernorm.weight")],
        axis=-1,
        epsilon=config.rms_norm_eps,
    )
    for i in range(config.num_layers):
        last = i == config.num_layers - 1
        mixed = attention(layers, config, normed, i, lengths, rotation, bidirectional)
        if last:  # behind the last attention only the positions that get logits matter
            mixed, x = _last_positions(graph, mixed, count), _last_positions(graph, x, count)
        mixed = layers.linear(mixed, decoder_layer(i) + "self_attn.o_proj")
        normed, x = add_and_norm(layers, config, mixed, x, decoder_layer(i) + "post_attention_layernorm.weight")
        inner = feed_forward(layers, normed, decoder_layer(i) + "mlp.")
        following = FINAL_NORM if last else decoder_layer(i + 1) + "input_layernorm.weight"
        normed, x = add_and_norm(layers, config, inner, x, following)

    logits = layers.linear(normed, HEAD.removesuffix(".weight"))
    if layers.dtype == "float32":
        graph.node("Identity", [logits], outputs=["logits"])
    else:
        graph.node("Cast", [logits], outputs=["logits"], to=1)
    graph.output("logits", "float32", [1, "logit_positions", config.vocab_size])
    return graph, layers.jobs


def attention(
    layers: LayerBuilder,
    config: DecoderConfig,
    normed: str,
    index: int,
    lengths: tuple[str, str],
    rotation: tuple[str, str],
    bidirectional: str | None = None,
) -> str:
    """Grouped-query attention over the cache, (1, n, hidden) -> (1, n, hidden).

    `bidirectional` names the bool scalar that lets the new positions see each other; without it they never do.
    """
    graph = layers.graph
    shape: list[int | str] = [1, config.num_kv_heads, "capacity", config.head_dim]
    past = [graph.input(f"past.{index}.{kind}", layers.dtype, shape) for kind in ("key", "value")]
    outputs = [f"attention.{index}", *(f"present.{index}.{kind}" for kind in ("key", "value"))]
    qkv = layers.linear(normed, decoder_layer(index) + "self_attn.qkv_proj")

    def causal(branch: str = "") -> list[str]:
        names = [branch + name for name in outputs]
        graph.microsoft(
            "GroupQueryAttention",
            [qkv, "", "", *past, *lengths, *rotation],
            outputs=names,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return names

    def full() -> list[str]:
        _, *cache = causal("full.")  # which also writes the cache
        return [_full_attention(graph, config, qkv, cache, lengths[1], rotation), *cache]

    if bidirectional is None:
        causal()
    else:
        graph.choose(bidirectional, full, lambda: causal("causal."), [(name, layers.dtype) for name in outputs])
    for name in outputs[1:]:
        graph.output(name, layers.dtype, shape)
    return outputs[0]


def _full_attention(
    graph: GraphBuilder, config: DecoderConfig, qkv: str, cache: Sequence[str], total: str, rotation: tuple[str, str]
) -> str:
    """The new positions over all that is cached, themselves included, (1, n, hidden) -> (1, n, hidden).

    GroupQueryAttention itself can leave out its mask in later versions of ONNX Runtime, but then holds all scores at
    once: 2 GiB for an image of 3600 tokens at 40 heads. This operator goes tile by tile on a CPU, as long as it has no
    mask and keys of as many heads as the queries, (1, positions, hidden).
    """
    zero, two, group = graph.constant([0]), graph.constant([2]), config.num_heads // config.num_kv_heads
    width = config.num_heads * config.head_dim
    end = graph.node("Reshape", [graph.node("Cast", [total], to=DTYPES["int64"]), graph.constant([1])])
    first = graph.node("Sub", [end, graph.node("Shape", [qkv], start=1, end=2)])  # the first new position
    q = graph.node("Slice", [qkv, zero, graph.constant([width]), two])
    q = graph.microsoft("RotaryEmbedding", [q, first, *rotation], num_heads=config.num_heads, interleaved=0)
    expanded = []
    for x in cache:
        x = graph.node("Slice", [x, zero, end, two])  # (1, kv_heads, positions, head_dim): without the unused capacity
        x = graph.node("Unsqueeze", [graph.node("Transpose", [x], perm=[0, 2, 1, 3]), graph.constant([3])])
        x = graph.node("Expand", [x, graph.constant([1, 1, 1, group, 1])])
        expanded.append(graph.node("Reshape", [x, graph.constant([1, -1, width])]))
    return graph.microsoft("MultiHeadAttention", [q, *expanded], num_heads=config.num_heads)


def feed_forward(layers: LayerBuilder, normed: str, prefix: str) -> str:
    """silu(gate) * up -> down, (1, n, hidden) -> (1, n, hidden)."""
    graph = layers.graph
    both = layers.linear(normed, prefix + "gate_up_proj")
    gate, up = graph.nodes("Split", [both], 2, axis=-1, num_outputs=2)
    activated = graph.microsoft("QuickGelu", [gate], alpha=1.0)  # x * sigmoid(alpha x): silu at alpha 1
    return layers.linear(graph.node("Mul", [activated, up]), prefix + "down_proj")


def add_and_norm(layers: LayerBuilder, config: DecoderConfig, x: str, residual: str, weight: str) -> tuple[str, str]:
    """(norm(x + residual), x + residual)."""
    graph = layers.graph
    total = f"residual.{weight}"
    normed = graph.microsoft(
        "SkipSimplifiedLayerNormalization",
        [x, residual, layers.vector(weight)],
        outputs=[f"normed.{weight}", "", "", total],
        epsilon=config.rms_norm_eps,
    )
    return normed, total


def _last_positions(graph: GraphBuilder, x: str, count: str) -> str:
    """The last `count` positions, (1, n, hidden) -> (1, count, hidden)."""
    end = graph.constant([np.iinfo(np.int64).max])
    return graph.node("Slice", [x, graph.node("Neg", [count]), end, graph.constant([1])])


def rotation_tables(layers: LayerBuilder, config: DecoderConfig) -> tuple[str, str]:
    """Cosines and sines of every position, (context, head_dim / 2).

    Rounded to float32 at each step as the reference's rotary embedding does: at position 32767 the angle's rounding
    alone shifts a cosine by 2e-3, and the model was trained with it.
    """
    half = config.head_dim // 2
    exponent = (np.arange(half) / half).astype(np.float32).astype(np.float64)
    frequency = np.float32(1) / (config.rope_theta**exponent).astype(np.float32)
    angle = (np.arange(config.context_length, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    cosine = layers.computed("rotation.cos", np.cos(angle).astype(layers.dtype))
    return cosine, layers.computed("rotation.sin", np.sin(angle).astype(layers.dtype))
