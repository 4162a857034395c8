"""What a checkpoint is, read from config.json and its neighbours into frozen dataclasses.

Whatever the graphs do not implement is rejected here, by name, before any work. Facts and defaults: the model's own
`config.json`; the vision tower's defaults are those of `Siglip2VisionConfig` (google/siglip2-so400m-patch16-naflex),
which the checkpoint does not repeat.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phisight.errors import ConfigError

__all__ = ["DecoderConfig", "GenerationDefaults", "ImageBudget", "ModelConfig", "VisionConfig", "read_json"]

SLIDING_WINDOW_HINT = "every layer attends to the whole context here"


@dataclass(frozen=True)
class DecoderConfig:
    """The Phi-3 decoder's shape. Sizes in elements, `context_length` in positions."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, item_size: int) -> int:
        """Bytes that one position takes in the KV cache, `item_size` bytes an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item_size


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP2-NaFlex tower's shape. `num_layers` counts the last layer too, which the model never uses."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int = 16
    table_side: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def used_layers(self) -> int:
        """Layers that reach the features, which are `hidden_states[-2]`."""
        return self.num_layers - 1

    @property
    def patch_dim(self) -> int:
        return self.patch_size * self.patch_size * 3


@dataclass(frozen=True)
class ImageBudget:
    """Fewest and most patches of one image (`preprocessor_config.json`)."""

    min_patches: int = 256
    max_patches: int = 3600


@dataclass(frozen=True)
class GenerationDefaults:
    """Where an answer ends and how it is sampled unless the user says otherwise (`generation_config.json`)."""

    eos_token_ids: tuple[int, ...]
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `vision` and `images` are None for a text-only checkpoint (`Phi3ForCausalLM`)."""

    decoder: DecoderConfig
    vision: VisionConfig | None
    images: ImageBudget | None
    generation: GenerationDefaults

    @classmethod
    def from_checkpoint(cls, directory: Path) -> ModelConfig:
        """Read a checkpoint directory.

        Raises ConfigError that lists everything missing or unsupported in one line.
        """
        reader = _Reader(directory / "config.json", read_json(directory / "config.json"))
        text_only = _is_text_only(reader)
        decoder = _decoder(reader)
        vision = None if text_only else _vision(reader)
        images = None if text_only else _budget(directory, reader)
        generation = _generation(directory, reader)
        reader.raise_problems()
        outside = [token for token in generation.eos_token_ids if token >= decoder.vocab_size]
        if outside:
            raise ConfigError(
                f"{directory}: eos_token_id {outside[0]} is outside the vocabulary of {decoder.vocab_size}: "
                "generation_config.json belongs to another model"
            )
        return cls(decoder, vision, images, generation)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError if it is missing, not JSON or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.name} is missing in {path.parent}: give a checkpoint directory that holds it"
        ) from None
    except NotADirectoryError:
        raise ConfigError(f"{path.parent} is a file: give a checkpoint directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a JSON object")
    return data


class _Reader:
    """Typed access to one JSON object that collects every problem instead of stopping at the first."""

    def __init__(self, path: Path, data: dict[str, Any], problems: list[str] | None = None) -> None:
        self.path = path
        self.data = data
        self.problems: list[str] = [] if problems is None else problems

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.data.get(key, default)
        if value is None:
            self.problems.append(f"{key} is missing")
            return minimum
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.problems.append(f"{key} is {value!r}, wanted an integer of at least {minimum}")
            return minimum
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key, default)
        if value is None:
            self.problems.append(f"{key} is missing")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.problems.append(f"{key} is {value!r}, wanted a positive number")
            return 1.0
        return float(value)

    def expect(self, key: str, *wanted: object, why: str = "") -> None:
        """Note a problem unless the key is absent or has one of the wanted values."""
        if key in self.data and self.data[key] not in wanted:
            text = " or ".join(json.dumps(w) for w in wanted)
            self.problems.append(
                f"{key} is {json.dumps(self.data[key])}, supported is {text}" + (f" ({why})" if why else "")
            )

    def section(self, key: str) -> _Reader:
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} is {value!r}, wanted an object")
            value = {}
        return _Reader(self.path, value, self.problems)

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError(f"{self.path}: " + "; ".join(self.problems))


def _is_text_only(reader: _Reader) -> bool:
    architectures = reader.data.get("architectures")
    if architectures == ["Phi4ForCausalLMV"]:
        return False
    if architectures == ["Phi3ForCausalLM"]:
        return True
    raise ConfigError(
        f"{reader.path}: architectures is {json.dumps(architectures)}, supported are "
        '["Phi4ForCausalLMV"] (Phi-4-reasoning-vision) and ["Phi3ForCausalLM"] (text only)'
    )


def _decoder(reader: _Reader) -> DecoderConfig:
    rope = reader.section("rope_scaling")
    if rope.data:
        kind = rope.data.get("rope_type", rope.data.get("type"))
        reader.problems.append(
            f"rope_scaling is of type {kind!r}, supported is no scaling (null): longrope, yarn and the like "
            "change the rotation with the length"
        )
    theta = reader.number("rope_theta", 10000.0)
    newer = reader.section("rope_parameters")  # the place for it in later versions of transformers
    if newer.data:
        newer.expect("rope_type", "default", why="no scaling of the rotation is implemented")
        theta = newer.number("rope_theta", theta)
    reader.expect("hidden_act", "silu")
    reader.expect("partial_rotary_factor", 1.0, why="the rotation covers the whole head")
    reader.expect("attention_bias", False, why="projections have no bias here")
    reader.expect("tie_word_embeddings", False, True)
    if reader.data.get("quantization_config"):
        reader.problems.append(
            "quantization_config is set: the checkpoint is already quantised, give the BF16, F16 or F32 one"
        )
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", heads)
    context = reader.integer("max_position_embeddings")
    window = reader.data.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window < context):
        reader.problems.append(
            f"sliding_window is {window!r}, smaller than max_position_embeddings {context}: {SLIDING_WINDOW_HINT}"
        )
    if hidden % heads:
        reader.problems.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    elif (hidden // heads) % 8:
        reader.problems.append(f"the head size {hidden // heads} is not a multiple of 8, as the attention needs")
    reader.expect("head_dim", None, hidden // heads, why="hidden_size / num_attention_heads")
    if heads % kv_heads:
        reader.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=reader.integer("vocab_size"),
        context_length=context,
        rope_theta=theta,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5),
    )


def _vision(reader: _Reader) -> VisionConfig:
    reader.expect("mm_projector_type", "mlp2x_gelu")
    reader.expect("use_mm_proj", True)
    reader.expect("use_s2", False, why="one scale per image")
    section = reader.section("vision_config")
    section.expect("model_type", "siglip2_vision_model")
    section.expect("hidden_act", "gelu_pytorch_tanh")
    section.expect("patch_size", 16)
    section.expect("num_channels", 3)
    section.expect("num_patches", 256, why="a position table of 16 x 16")
    hidden, heads = section.integer("hidden_size", 1152), section.integer("num_attention_heads", 16)
    if hidden % heads:
        reader.problems.append(f"vision hidden_size {hidden} is not a multiple of its heads {heads}")
    reader.expect("mm_hidden_size", hidden, why="the vision tower's hidden_size")
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size", 4304),
        num_layers=section.integer("num_hidden_layers", 27, minimum=2),
        num_heads=heads,
        layer_norm_eps=section.number("layer_norm_eps", 1e-6),
    )


def _budget(directory: Path, reader: _Reader) -> ImageBudget:
    """The image budget: preprocessor_config.json, or config.json where that file is absent, as the reference does."""
    path = directory / "preprocessor_config.json"
    source = _Reader(path, read_json(path), reader.problems) if path.is_file() else reader
    source.expect("patch_size", 16)
    source.expect("resample", 2, why="bilinear")
    source.expect("image_mean", [0.5, 0.5, 0.5])
    source.expect("image_std", [0.5, 0.5, 0.5])
    for step in ("do_resize", "do_rescale", "do_normalize"):
        source.expect(step, True)
    budget = ImageBudget(source.integer("min_num_patches", 256), source.integer("max_num_patches", 3600))
    if budget.min_patches > budget.max_patches:
        reader.problems.append(
            f"min_num_patches {budget.min_patches} is larger than max_num_patches {budget.max_patches}"
        )
    return budget


def _generation(directory: Path, reader: _Reader) -> GenerationDefaults:
    path = directory / "generation_config.json"
    source = _Reader(path, read_json(path), reader.problems) if path.is_file() else reader
    eos = source.data.get("eos_token_id", reader.data.get("eos_token_id"))
    ids: list[Any] = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):  # true and false are no ids
        reader.problems.append(f"eos_token_id is {eos!r}, wanted one token id or a list of them")
        ids = []
    sampled = source.data.get("do_sample", True)
    return GenerationDefaults(
        eos_token_ids=tuple(ids),
        temperature=source.number("temperature", 0.8) if sampled else 0.0,
        top_p=source.number("top_p", 0.95) if sampled else 1.0,
    )
