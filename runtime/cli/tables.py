"""Plans, manifests and configurations as lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from phisight.config import ModelConfig
from phisight.manifest import TensorEntry, bits_per_weight

__all__ = ["describe_config", "describe_plan", "describe_tensors"]

GROUPS = {
    "decoder": ("decoder",),
    "head and embeddings": ("head", "embeddings"),
    "vision and projector": ("vision", "projector"),
    "the same as ONNX": ("onnx_vision",),
}


def describe_plan(tensors: Mapping[str, TensorEntry], unused: Sequence[str], config: ModelConfig) -> Iterator[str]:
    """What an export will do."""
    yield from describe_config(config)
    yield from describe_tensors(tensors)
    if unused:
        yield f"left out, since the model never uses them: {len(unused)} tensors of the vision tower"


def describe_config(config: ModelConfig) -> Iterator[str]:
    """A model's shape."""
    d, v = config.decoder, config.vision
    yield (
        f"decoder: {d.num_layers} layers, width {d.hidden_size}, {d.num_heads} heads on {d.num_kv_heads}, "
        f"vocabulary {d.vocab_size}, context {d.context_length}"
    )
    if v is None or config.images is None:
        yield "vision: none, text only"
    else:
        yield (
            f"vision: {v.used_layers} of {v.num_layers} layers, width {v.hidden_size}, "
            f"{config.images.min_patches} to {config.images.max_patches} patches an image"
        )


def describe_tensors(tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Weights, bytes and bits per weight of each group and scheme."""
    yield f"{'part':<22}{'scheme':<16}{'tensors':>8}{'weights':>16}{'bytes':>16}{'bits/weight':>13}"
    for group, parts in GROUPS.items():
        entries = [entry for entry in tensors.values() if entry.part in parts]
        for scheme in sorted({entry.scheme for entry in entries}):
            yield _row(group, scheme, [entry for entry in entries if entry.scheme == scheme])
        if len({entry.scheme for entry in entries}) > 1:
            yield _row(group, "together", entries)
    yield _row("all", "", list(tensors.values()))


def _row(group: str, scheme: str, entries: Iterable[TensorEntry]) -> str:
    chosen = {str(i): entry for i, entry in enumerate(entries)}
    weights, size = sum(e.weights for e in chosen.values()), sum(e.bytes for e in chosen.values())
    bits = bits_per_weight(chosen, *{entry.part for entry in chosen.values()})
    return f"{group:<22}{scheme:<16}{len(chosen):>8}{weights:>16,}{size:>16,}{bits:>13.2f}"
