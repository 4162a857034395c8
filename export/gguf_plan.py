"""The plan of a GGUF export: the ggml type of every tensor in the text file and in the mmproj."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Literal, get_args

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.chunks import ImageAttention, check_image_attention
from phisight.config import DecoderConfig
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.gguf_types import PRESETS, SIMPLE_TYPES, fitting_type, preset_type
from phisight.export.names import PATCH_EMBEDDING, POSITION_TABLE, TensorSpec, gguf_name
from phisight.export.plan import (
    ExportOptions,
    Method,
    OnnxVisionType,
    Plan,
    check_sees,
    make_plan,
    written_attention,
)
from phisight.manifest import TensorEntry
from phisight.quant.imatrix import ImportanceMatrix
from phisight.quant.scheme import BlockScheme

__all__ = [
    "BLOCK_SCHEMES",
    "GgufOptions",
    "GgufPlan",
    "PlannedTensor",
    "from_kernel",
    "make_gguf_plan",
    "to_kernel",
]

GgufVisionType = Literal["F32", "F16", "Q8_0"]

BLOCK_SCHEMES = {"Q4_0": BlockScheme(4, 32), "Q8_0": BlockScheme(8, 32)}
"""Types that hold the numbers of the ONNX export, whatever the method that chose them."""


@dataclass(frozen=True)
class GgufOptions:
    """What the user chose. `decoder` is a preset of llama.cpp's names, `overrides` types of single tensors.

    `onnx_vision` is the form of the tower that goes beside the files as ONNX, or "none". `imatrix` weighs the errors of
    all types that ggml's own quantiser packs. `method` is how the blocks of Q4_0 and Q8_0 were chosen.
    `image_attention` is how the directory is run unless the user says otherwise: the tensors are the same either way.
    """

    decoder: str = "Q4_0"
    vision: GgufVisionType = "F16"
    onnx_vision: OnnxVisionType = "w8a8"
    overrides: tuple[tuple[str, str], ...] = ()
    imatrix: ImportanceMatrix | None = field(default=None, compare=False, repr=False)
    method: Method = "rtn"
    image_attention: ImageAttention = "causal"

    def __post_init__(self) -> None:
        if self.decoder not in PRESETS:
            raise InputError(f"decoder is {self.decoder!r}, wanted one of {', '.join(PRESETS)}")
        if self.vision not in get_args(GgufVisionType):
            raise InputError(f"vision is {self.vision!r}, wanted one of {', '.join(get_args(GgufVisionType))}")
        if self.onnx_vision not in get_args(OnnxVisionType):
            raise InputError(
                f"onnx_vision is {self.onnx_vision!r}, wanted one of {', '.join(get_args(OnnxVisionType))}"
            )
        if self.method not in get_args(Method):
            raise InputError(f"method is {self.method!r}, wanted one of {', '.join(get_args(Method))}")
        check_image_attention(self.image_attention)
        if self.method != "rtn" and self.decoder not in BLOCK_SCHEMES:
            raise InputError(
                f"{self.decoder.lower()} does not go by the method {self.method}, but by ggml's own quantiser: take "
                "q4_0 or q8_0, or make an importance matrix with phisight imatrix"
            )
        types = {self.decoder, *(kind for _, kind in self.overrides)}
        # Behind a method that calibrates it weighs what is left to ggml, such as the head of q4_0 in Q6_K.
        if self.imatrix is not None and self.method == "rtn" and types <= {*SIMPLE_TYPES, "Q4_0"}:
            raise InputError(
                f"an importance matrix has no use for {self.decoder.lower()}, which holds the checkpoint's floats or "
                "the numbers of the ONNX export: take a type such as q4_k_m, or leave the matrix out"
            )

    def as_json(self) -> dict[str, str | int]:
        """For the manifest."""
        names = {"decoder": self.decoder.lower(), "vision": self.vision.lower(), "onnx_vision": self.onnx_vision}
        options: dict[str, str | int] = dict(names)
        if self.overrides:
            options["overrides"] = len(self.overrides)
        if self.method != "rtn":
            options["method"] = self.method
        if self.imatrix is not None:
            options["imatrix"] = self.imatrix.digest
        return options | written_attention(self.image_attention)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a GGUF file: its name there, where it comes from, its type, and how much its columns matter."""

    name: str
    spec: TensorSpec
    type: str
    importance: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def block_scheme(self) -> BlockScheme | None:
        """Of the types that hold the ONNX export's numbers."""
        return BLOCK_SCHEMES.get(self.type)

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored, outermost first. The patch embedding becomes a convolution's kernel."""
        if self.spec.name == PATCH_EMBEDDING + ".weight":
            return (self.spec.shape[0], 3, 16, 16)
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return prod(self.shape) // block * size


def to_kernel(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The patch embedding's rows, (width, rows x columns x channels), as a convolution's kernel, (width, 3, 16, 16)."""
    return np.ascontiguousarray(rows.reshape(-1, 16, 16, 3).transpose(0, 3, 1, 2))


def from_kernel(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `to_kernel`, (width, rows, columns, channels); the kernel may be flat."""
    return kernel.reshape(-1, 3, 16, 16).transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class GgufPlan:
    """Tensors of the text file and of the mmproj, in the files' order, and the plan of the ONNX tower if any."""

    options: GgufOptions
    text: list[PlannedTensor]
    vision: list[PlannedTensor]
    onnx: Plan | None
    unused: list[str]

    @property
    def schemes(self) -> dict[str, BlockScheme]:
        """Of the text file's tensors that have one, by their names in the checkpoint."""
        return {tensor.spec.name: scheme for tensor in self.text if (scheme := tensor.block_scheme)}

    @property
    def all_ours(self) -> bool:
        """Whether ggml's own quantiser has nothing to do in the text file."""
        return {tensor.type for tensor in self.text} <= {*BLOCK_SCHEMES, *SIMPLE_TYPES}

    def entries(self) -> dict[str, TensorEntry]:
        """As the manifest keeps it; the tower's ONNX form under names that say so."""
        rows = {
            t.spec.name: TensorEntry(t.spec.part, t.type.lower(), t.spec.size, t.nbytes)
            for t in (*self.text, *self.vision)
        }
        for name, entry in (self.onnx.entries() if self.onnx else {}).items():
            if entry.part in ("vision", "projector"):
                rows[f"vision.onnx/{name}"] = TensorEntry("onnx_vision", entry.scheme, entry.weights, entry.bytes)
        return rows

    def as_json(self) -> dict[str, object]:
        """Every tensor's entry, and the names that are left out."""
        return {"tensors": {name: asdict(entry) for name, entry in self.entries().items()}, "unused": self.unused}

    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries().values())

    def total_weights(self) -> int:
        """Weights to be written: those of the tower count twice if it is also written as ONNX."""
        return sum(entry.weights for entry in self.entries().values())


def make_gguf_plan(checkpoint: Checkpoint, options: GgufOptions) -> GgufPlan:
    """Choose a type for every tensor that the model uses.

    Vectors and norms are F32, as in llama.cpp. Matrices of the decoder follow the preset, those of tower and projector
    `vision`; where rows do not fit a type's block (the tower's FFN of 4304 in Q8_0) the type is F16. Raises InputError
    for an override that names no matrix, a type that rows do not fit, or an importance matrix of another model, and for
    image attention without images.
    """
    check_sees(checkpoint.config, options.image_attention)
    overrides = dict(options.overrides)
    text, vision = [], []
    for name, source in checkpoint.tensors.items():
        spec = source.spec
        if spec.part == "unused":
            continue
        stored = gguf_name(name)
        if spec.part in ("vision", "projector"):
            vision.append(PlannedTensor(stored, spec, _vision_type(spec, options, overrides.pop(stored, None))))
        else:
            chosen = _text_type(spec, stored, options, checkpoint.config.decoder, overrides.pop(stored, None))
            text.append(PlannedTensor(stored, spec, chosen, _importance(stored, spec, options.imatrix)))
    if overrides:
        raise InputError(f"the plan names tensors that this model does not have: {', '.join(overrides)}")
    if options.imatrix is not None and all(tensor.importance is None for tensor in text):
        raise InputError("the importance matrix names no weight of this model: give one made for it")
    onnx = None
    if checkpoint.config.vision is not None and options.onnx_vision != "none":
        onnx = make_plan(checkpoint.config, ExportOptions(decoder="int8", vision=options.onnx_vision))
    return GgufPlan(options, text, vision, onnx, checkpoint.unused)


def _text_type(spec: TensorSpec, name: str, options: GgufOptions, config: DecoderConfig, override: str | None) -> str:
    if len(spec.shape) == 1:
        return _vector(name, override)
    if override is not None:
        return _checked(name, override, spec.shape[1])
    groups = config.num_heads // config.num_kv_heads
    weighed = options.imatrix is not None
    chosen = preset_type(options.decoder, name, layers=config.num_layers, groups=groups, imatrix=weighed)
    return fitting_type(chosen, spec.shape[1])


def _importance(name: str, spec: TensorSpec, matrix: ImportanceMatrix | None) -> NDArray[np.float32] | None:
    """Raises InputError for a matrix of another model."""
    return None if matrix is None or len(spec.shape) != 2 else matrix.columns(name, spec.shape[1])


def _vision_type(spec: TensorSpec, options: GgufOptions, override: str | None) -> str:
    if len(spec.shape) == 1 or spec.name == POSITION_TABLE:
        return _vector(spec.name, override)
    if spec.name == PATCH_EMBEDDING + ".weight":
        # A kernel's rows are 16 long, which no block fits; llama.cpp wants floats.
        return _vector(spec.name, override) if options.vision != "F16" else "F16"
    if override is not None:
        return _checked(spec.name, override, spec.shape[1])
    return fitting_type(options.vision, spec.shape[1])


def _vector(name: str, override: str | None) -> str:
    if override not in (None, "F32"):
        raise InputError(f"{name} is no matrix of weights: llama.cpp wants it as F32, the plan says {override}")
    return "F32"


def _checked(name: str, type_name: str, columns: int) -> str:
    known = tuple(dict.fromkeys(base for base, _ in PRESETS.values()))
    if type_name not in known:
        raise InputError(f"{name}: {type_name!r} is no ggml type for weights, wanted one of {', '.join(known)}")
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
    if columns % block:
        raise InputError(f"{name}: rows of {columns} are no multiple of {type_name}'s block of {block}")
    return type_name
