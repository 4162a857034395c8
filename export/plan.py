"""The plan of an export: which tensor is stored by which scheme, and what that costs. Made before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from phisight.chunks import ImageAttention, check_image_attention
from phisight.config import ModelConfig
from phisight.errors import InputError
from phisight.export.names import HEAD, PATCH_EMBEDDING, POSITION_TABLE, TensorSpec, expected_tensors
from phisight.manifest import TensorEntry
from phisight.quant.scheme import SCHEMES, BlockScheme, BlockSize, ChannelScheme, FloatScheme, FloatType, Scheme

__all__ = [
    "HESSIAN_METHODS",
    "SCALING_METHODS",
    "DecoderType",
    "ExportOptions",
    "HeadType",
    "Method",
    "OnnxVisionType",
    "Plan",
    "VisionType",
    "allowed_schemes",
    "check_sees",
    "make_plan",
    "written_attention",
]

DecoderType = Literal["f32", "f16", "int8", "int4"]
VisionType = Literal["f32", "f16", "int8", "w8a8"]
OnnxVisionType = Literal["f32", "f16", "int8", "w8a8", "none"]
"""The tower beside GGUF files."""
HeadType = Literal["f32", "f16", "int8", "int4"]
Method = Literal["rtn", "search", "awq", "gptq", "awq+gptq"]
SCALING_METHODS: tuple[Method, ...] = ("awq", "awq+gptq")
"""Scale channels of all matrices of a layer together."""
HESSIAN_METHODS: tuple[Method, ...] = ("gptq", *SCALING_METHODS)


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose. `head` and `vision` may be None: see `resolved`.

    `float_type` is the type in which the graph computes: f32 for CPUs, f16 for GPUs. `accuracy_level` is that of
    MatMulNBits: 0 computes in the float type, 4 with activations rounded to INT8 block by block. `method` is how the
    decoder's and the head's blocks were chosen; all but rtn need a calibration. `asymmetric` gives INT4 blocks zero
    points. `overrides` are schemes of single tensors, by name and label, as a plan file has them. `image_attention`
    bidirectional makes a decoder that can be run either way, and is unless the user says otherwise. `kv` int8 adds a
    graph of the decoder with an INT8 KV cache: the directory can then be opened with either type.
    """

    decoder: DecoderType = "int4"
    vision: VisionType | None = None
    block_size: BlockSize = 32
    head: HeadType | None = None
    float_type: FloatType = "f32"
    method: Method = "rtn"
    accuracy_level: Literal[0, 4] = 4
    asymmetric: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    image_attention: ImageAttention = "causal"
    kv: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        _one_of("decoder", self.decoder, get_args(DecoderType))
        _one_of("vision", self.vision, (None, *get_args(VisionType)))
        _one_of("block_size", self.block_size, get_args(BlockSize))
        _one_of("head", self.head, (None, *get_args(HeadType)))
        _one_of("float", self.float_type, get_args(FloatType))
        _one_of("method", self.method, get_args(Method))
        _one_of("accuracy_level", self.accuracy_level, (0, 4))
        check_image_attention(self.image_attention)
        _one_of("kv", self.kv, (None, "int8"))
        if self.kv is not None and (self.float_type, self.image_attention) != ("f32", "causal"):
            raise InputError(
                "kv is int8, which goes with --float f32 and causal image attention, but these are "
                f"{self.float_type} and {self.image_attention}: leave one of them out"
            )
        if self.asymmetric and "int4" not in (self.decoder, self.head):
            raise InputError(
                f"asymmetric blocks are of INT4, but the decoder is {self.decoder}: take --decoder int4, or leave "
                "--asymmetric out"
            )
        if self.float_type == "f16" and "f32" in (self.decoder, self.head):
            raise InputError(
                "float32 weights in a float16 graph would be rounded anyway: use --decoder f16 --head f16, "
                "or --float f32"
            )

    @property
    def resolved_head(self) -> HeadType:
        """The head's type: the decoder's if that is a float type, else INT8."""
        if self.head is not None:
            return self.head
        return self.decoder if self.decoder in ("f32", "f16") else "int8"

    @property
    def resolved_vision(self) -> VisionType:
        """The tower's type: integer products in a float32 graph with a quantised decoder, else as the decoder."""
        if self.vision is not None:
            return self.vision
        if self.decoder in ("f32", "f16"):
            return self.decoder
        return "w8a8" if self.float_type == "f32" else "f16"

    @property
    def vision_float(self) -> FloatType:
        """The type in which the vision graph computes. Integer products exist with float32 only."""
        return "f32" if self.resolved_vision in ("f32", "w8a8") else self.float_type

    def as_json(self) -> dict[str, str | int]:
        """For the manifest, every choice spelled out; of the rare ones only those that were made."""
        rare = {"asymmetric": int(self.asymmetric), "overrides": len(self.overrides)}
        return {
            "decoder": self.decoder,
            "vision": self.resolved_vision,
            "block_size": self.block_size,
            "head": self.resolved_head,
            "float": self.float_type,
            "method": self.method,
            "accuracy_level": self.accuracy_level,
            **{name: value for name, value in rare.items() if value},
            **written_attention(self.image_attention),
            **({} if self.kv is None else {"kv": self.kv}),
        }


@dataclass(frozen=True)
class Plan:
    """Scheme of every used tensor, by name."""

    options: ExportOptions
    specs: dict[str, TensorSpec]
    schemes: dict[str, Scheme]
    unused: list[str] = field(default_factory=list)

    def entries(self) -> dict[str, TensorEntry]:
        """The plan as the manifest keeps it."""
        return {name: self._entry(name) for name in self.schemes}

    def as_json(self) -> dict[str, object]:
        """Every tensor's entry, and the names that are left out."""
        return {"tensors": {name: asdict(entry) for name, entry in self.entries().items()}, "unused": self.unused}

    def _entry(self, name: str) -> TensorEntry:
        spec, scheme = self.specs[name], self.schemes[name]
        return TensorEntry(spec.part, scheme.label, spec.size, scheme.stored_bytes(spec.shape))

    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries().values())

    def total_weights(self) -> int:
        return sum(entry.weights for entry in self.entries().values())


def written_attention(attention: ImageAttention) -> dict[str, str]:
    """Image attention as a manifest has it: the reference's own way goes without saying."""
    return {} if attention == "causal" else {"image_attention": attention}


def check_sees(config: ModelConfig, attention: ImageAttention) -> None:
    """Raises InputError for an image attention that means nothing to a text-only model."""
    if attention == "bidirectional" and config.vision is None:
        raise InputError("image_attention is bidirectional, but the checkpoint is text only: leave it out")


def make_plan(config: ModelConfig, options: ExportOptions) -> Plan:
    """Choose a scheme for every tensor that the model uses.

    Matrices follow the options; the embeddings follow the head, but are INT8 where the head is INT4, since the host
    looks rows up in them. Norms, biases, the position table and the patch embedding (0.2 % of the tower) stay in the
    graph's float type. Raises InputError for an override that names no matrix or a scheme that the matrix cannot have,
    and for image attention without images.
    """
    check_sees(config, options.image_attention)
    specs = expected_tensors(config)
    schemes = {name: _scheme(spec, options) for name, spec in specs.items() if spec.part != "unused"}
    for name, label in options.overrides:
        if name not in schemes:
            raise InputError(f"the plan names {name}, which this model does not have: give one such as {HEAD}")
        allowed = allowed_schemes(specs[name], options)
        if label not in allowed:
            raise InputError(f"the plan has {label!r} for {name}, wanted one of {', '.join(allowed)}")
        schemes[name] = SCHEMES[label]
    if options.method in SCALING_METHODS:
        _check_foldable(schemes, specs)
    unused = [name for name, spec in specs.items() if spec.part == "unused"]
    return Plan(options, specs, schemes, unused)


def allowed_schemes(spec: TensorSpec, options: ExportOptions) -> list[str]:
    """Labels of the schemes that a tensor can have."""
    graph_float = _graph_float(spec, options)
    if _is_plain(spec):
        return [graph_float.label]
    floats = ["f16", "f32"] if graph_float.dtype == "f32" else ["f16"]
    if spec.part == "embeddings":
        return ["int8 block 32", *floats]  # the host reads no other
    blocks = [label for label, scheme in SCHEMES.items() if isinstance(scheme, BlockScheme)]
    channels = ["int8 channel"] if spec.part in ("vision", "projector") and graph_float.dtype == "f32" else []
    return [*blocks, *channels, *floats]


def _check_foldable(schemes: Mapping[str, Scheme], specs: Mapping[str, TensorSpec]) -> None:
    """Raises InputError where awq would fold scales into a layer of which it quantises only some matrices."""
    matrices = [name for name, spec in specs.items() if spec.part == "decoder" and len(spec.shape) == 2]
    floats = [name for name in matrices if not isinstance(schemes[name], BlockScheme)]
    if floats and len(floats) < len(matrices):
        raise InputError(
            f"awq scales all matrices of the decoder in blocks, but the plan has {schemes[floats[0]].label} for "
            f"{floats[0]}: take --method gptq, or INT8"
        )


def _graph_float(spec: TensorSpec, options: ExportOptions) -> FloatScheme:
    return FloatScheme(options.vision_float if spec.part in ("vision", "projector") else options.float_type)


def _is_plain(spec: TensorSpec) -> bool:
    return len(spec.shape) == 1 or spec.name in (POSITION_TABLE, PATCH_EMBEDDING + ".weight")


def _scheme(spec: TensorSpec, options: ExportOptions) -> Scheme:
    if _is_plain(spec):
        return _graph_float(spec, options)
    choice: str = {
        "decoder": options.decoder,
        "head": options.resolved_head,
        "embeddings": "int8" if options.resolved_head == "int4" else options.resolved_head,
        "vision": options.resolved_vision,
        "projector": options.resolved_vision,
    }[spec.part]
    match choice:
        case "f32" | "f16":
            return FloatScheme("f32" if choice == "f32" else "f16")
        case "w8a8":
            return ChannelScheme()
        case "int4":
            return BlockScheme(4, options.block_size, not options.asymmetric)
        case _:
            # The host looks embeddings up in blocks of 32, whatever the graph's block is.
            return BlockScheme(8, 32 if spec.part == "embeddings" else options.block_size)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        text = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise InputError(f"{name} is {value!r}, wanted one of {text}")
