"""Mixed precision by measurement: what each matrix may be stored in, and the plan that meets a size or a divergence.

sensitivities (export/calibration/sensitivity.py) -> choices of each matrix -> allocation -> overrides of a plan
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gguf

from phisight.errors import EngineError, InputError
from phisight.export.calibration.sensitivity import Sensitivity
from phisight.export.checkpoint import Checkpoint
from phisight.export.gguf_plan import BLOCK_SCHEMES, GgufPlan
from phisight.export.names import EMBEDDINGS, expected_tensors, gguf_name
from phisight.export.plan import SCALING_METHODS, Plan
from phisight.export.plan_file import SCHEMA
from phisight.manifest import bits_per_weight
from phisight.quant.allocation import Allocation, Choice, Frontier
from phisight.quant.ggml import GgmlQuantizer, ggml_type
from phisight.quant.methods.awq import Awq
from phisight.quant.methods.base import Method
from phisight.quant.methods.gptq import Gptq
from phisight.quant.methods.rtn import RoundToNearest
from phisight.quant.methods.search import ScaleSearch
from phisight.quant.scheme import SIZES, BlockScheme
from phisight.quant.stored_types import BlockType, GgmlType, StoredType

__all__ = ["METHODS", "MixedPlan", "Target", "gguf_types", "mixed_plan", "onnx_types"]

METHODS: dict[str, Method] = {
    "rtn": RoundToNearest(),
    "search": ScaleSearch(),
    "awq": Awq(),
    "gptq": Gptq(),
    "awq+gptq": Gptq(name="awq+gptq"),
}
"""By which each matrix is tried: of awq without the scales of channels, which go beyond one matrix."""
TEXT_PARTS = ("decoder", "head", "embeddings")
GGML_TYPES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1")
"""That are tried beside Q4_0 and Q8_0, as far as rows fit their blocks."""
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SIZE = re.compile(r"([0-9.]+) ?(bpw|[kmg]i?b)", re.IGNORECASE)
BUDGET = re.compile(r"kld ?<=? ?([0-9.]+(?:e-?[0-9]+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What a plan must meet, as it was given in `text`: at most `value` bits per weight, bytes, or nats."""

    kind: Literal["bpw", "bytes", "kld"]
    value: float
    text: str

    @classmethod
    def size(cls, text: str) -> Target:
        """Of decoder, head and embeddings in bits per weight, or of all that is written. Raises InputError."""
        match = SIZE.fullmatch(text.strip())
        value = _number(match[1]) if match else 0
        if match is None or value <= 0:
            raise InputError(f"--size is {text!r}: give bits per weight, such as 4.6bpw, or a size, such as 9GB")
        unit = match[2].lower()
        return cls("bpw", value, text) if unit == "bpw" else cls("bytes", value * UNITS[unit], text)

    @classmethod
    def budget(cls, text: str) -> Target:
        """Of mean KL divergence. Raises InputError."""
        match = BUDGET.fullmatch(text.strip())
        value = _number(match[1]) if match else 0
        if value <= 0:
            raise InputError(f"--budget is {text!r}: give a mean KL divergence in nats, such as kld<0.01")
        return cls("kld", value, text)


@dataclass(frozen=True)
class MixedPlan:
    """An allocation by the checkpoint's names, what every type would have brought, and the target it meets."""

    target: Target
    allocation: Allocation
    choices: Mapping[str, Sequence[Choice]]
    shapes: Mapping[str, tuple[int, ...]]

    def overrides(self, form: str) -> tuple[tuple[str, str], ...]:
        """For the options of an export to `form`, "onnx" or "gguf"."""
        return tuple((_named(name, form), choice.type) for name, choice in self.allocation.choices.items())

    def weights(self, name: str) -> int:
        rows, columns = self.shapes[name]
        return rows * columns

    def bits(self, name: str) -> float:
        """Per weight."""
        return 8 * self.allocation.choices[name].bytes / self.weights(name)

    def document(self, plan: Plan | GgufPlan, form: str, measured: float | None, positions: int) -> dict[str, Any]:
        """For a plan file (see `phisight.export.plan_file`) of the whole `plan` that came of it."""
        entries = {name: entry for name, entry in plan.entries().items() if entry.part in TEXT_PARTS}
        return {
            "schema": SCHEMA,
            "format": form,
            "method": plan.options.method,
            "target": self.target.text,
            "bytes": sum(entry.bytes for entry in entries.values()),
            "bits_per_weight": bits_per_weight(entries, *TEXT_PARTS),
            "kld": {"sum": self.allocation.kld, "measured": measured, "positions": positions},
            "tensors": {
                _named(name, form): {
                    "type": choice.type,
                    "bits_per_weight": self.bits(name),
                    "kld": choice.kld,
                    "choices": {each.type: {"bytes": each.bytes, "kld": each.kld} for each in self.choices[name]},
                }
                for name, choice in self.allocation.choices.items()
            },
        }


def onnx_types(
    checkpoint: Checkpoint, method: Method, block_size: int | None, *, asymmetric: bool
) -> dict[str, list[StoredType]]:
    """Types that the matrices of the decoder, the head and the embeddings may have in ONNX; the first is measured.

    INT4 in blocks of `block_size`, or of any size, and INT8 in blocks of 32. The host reads embeddings in INT8 alone.
    """
    sizes = [size for size in SIZES if block_size in (None, size)]
    schemes = [BlockScheme(4, size, not asymmetric) for size in sizes]
    schemes.append(BlockScheme(8, 32))
    types: dict[str, list[StoredType]] = {}
    for name in _matrices(checkpoint):
        if name == EMBEDDINGS:
            types[name] = [BlockType(schemes[-1].label, schemes[-1], METHODS["rtn"])]
        else:
            types[name] = [BlockType(scheme.label, scheme, method) for scheme in schemes]
    return types


def gguf_types(checkpoint: Checkpoint, method: Method) -> tuple[dict[str, list[StoredType]], str | None]:
    """As `onnx_types`, and a note on what stands in the way of more types.

    Q4_0 and Q8_0 by the method, which ggml's own types do not go by: there it weighs errors by the inputs' moments.
    """
    ours: list[str] = list(BLOCK_SCHEMES)
    others: tuple[str, ...] = GGML_TYPES
    note = None
    if method.name in SCALING_METHODS:
        others, note = (), "awq scales layers whose matrices all go by it: q4_0 and q8_0 alone are tried"
    else:
        try:
            GgmlQuantizer(GGML_TYPES[0])
        except EngineError as error:
            others, note = (), f"q4_0 and q8_0 alone are tried: {error}"
    types: dict[str, list[StoredType]] = {}
    for name in _matrices(checkpoint):
        own = METHODS["rtn"] if name == EMBEDDINGS else method
        columns = checkpoint.tensors[name].shape[1]
        types[name] = [BlockType(label, BLOCK_SCHEMES[label], own) for label in ours]
        types[name] += [GgmlType(label, method.name != "rtn") for label in others if _fits(label, columns)]
    return types, note


def mixed_plan(
    checkpoint: Checkpoint,
    base: Plan | GgufPlan,
    types: Mapping[str, Sequence[StoredType]],
    sensitivities: Mapping[str, Sensitivity],
    target: Target,
    scale: float = 1.0,
) -> MixedPlan:
    """The best types for the matrices of `base` that have some. `scale` is how far sums of divergences were off.

    Raises InputError if no allocation meets the target, with what can be reached.
    """
    entries = base.entries()
    shapes = {name: checkpoint.tensors[name].shape for name in types}
    choices = {
        name: [replace(each, kld=each.kld * scale) for each in sensitivities[name].choices(kinds, shapes[name])]
        for name, kinds in types.items()
    }
    frontier = Frontier(choices)
    if target.kind == "kld":
        allocation = _within(target, lambda: frontier.within_kld(target.value))
    else:
        counted = [name for name, entry in entries.items() if target.kind == "bytes" or entry.part in TEXT_PARTS]
        fixed = sum(entries[name].bytes for name in counted if name not in types)
        whole = target.value
        if target.kind == "bpw":
            whole = target.value * sum(entries[name].weights for name in counted) / 8
        allocation = _within(target, lambda: frontier.within_bytes(whole - fixed))
    return MixedPlan(target, allocation, choices, shapes)


def _within(target: Target, allocate: Callable[[], Allocation]) -> Allocation:
    try:
        return allocate()
    except InputError as error:
        raise InputError(f"{target.text} cannot be met: {error}") from None


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """In the order in which they work."""
    specs = expected_tensors(checkpoint.config).values()
    return [spec.name for spec in specs if spec.part in TEXT_PARTS and len(spec.shape) == 2]


def _named(name: str, form: str) -> str:
    return gguf_name(name) if form == "gguf" else name


def _fits(label: str, columns: int) -> bool:
    """Whether rows fit the type's block. Where those of the k-quants do, the older types are not worth a trial."""
    block = gguf.GGML_QUANT_SIZES[ggml_type(label)][0]
    return columns % block == 0 and not (block == 32 and columns % 256 == 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
