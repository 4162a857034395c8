"""What a model is, read from its GGUF files: the text file, and the mmproj of its vision tower.

Both may come from anybody. What llama.cpp would trust is checked here first: the kinds of both files, every width, and
that all tensors are there with the shapes that the metadata speaks of.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter; ours begin with `phisight.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig
from phisight.errors import ModelDirError
from phisight.gguf_file import GgufFile

__all__ = ["config_from_gguf"]

ARCHITECTURE = "phi3"
PROJECTOR = "phi4"
DEFAULTS = GenerationDefaults(())


def config_from_gguf(text: GgufFile, mmproj: GgufFile | None = None) -> ModelConfig:
    """The model of a text file, with the vision of an mmproj if there is one.

    Raises ModelDirError for files of another model, for a pair that does not fit, and for what is not supported; it
    lists everything found in one file in one line.
    """
    _check_architecture(text, ARCHITECTURE, "the text model")
    keys = _Keys(text)
    decoder = _decoder(keys)
    _check_vocabulary(keys, decoder.vocab_size)
    generation = _generation(keys, decoder.vocab_size)
    keys.expect_tensors(_text_tensors(decoder))
    keys.raise_problems()
    if mmproj is None:
        return ModelConfig(decoder, None, None, generation)
    _check_architecture(mmproj, "clip", "the mmproj, the file of the vision tower")
    keys = _Keys(mmproj)
    _check_projector(keys)
    vision, images = _vision(keys), _budget(keys)
    width = keys.integer("clip.vision.projection_dim")
    if width != decoder.hidden_size:
        keys.problems.append(
            f"its image tokens have the width {width}, those of {text.path} {decoder.hidden_size}: "
            "the two files belong to different models"
        )
    keys.expect_tensors(_vision_tensors(vision, width))
    keys.raise_problems()
    return ModelConfig(decoder, vision, images, generation)


def _check_architecture(file: GgufFile, wanted: str, what: str) -> None:
    found = file.metadata.get("general.architecture")
    if found != wanted:
        swapped = {"clip": ": give it as the mmproj", ARCHITECTURE: ": give it as the model"}.get(str(found), "")
        raise ModelDirError(f"{file.path} is of the architecture {found!r}, wanted is {wanted!r} for {what}{swapped}")


def _check_projector(keys: _Keys) -> None:
    metadata = keys.file.metadata
    found = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    if metadata.get("clip.has_vision_encoder") is not True or found != PROJECTOR:
        raise ModelDirError(
            f"{keys.file.path} has a projector of type {found!r}, wanted is {PROJECTOR!r}: "
            "use the mmproj of Phi-4-reasoning-vision"
        )


def _decoder(keys: _Keys) -> DecoderConfig:
    metadata = keys.file.metadata
    hidden, heads = keys.integer("phi3.embedding_length"), keys.integer("phi3.attention.head_count")
    kv_heads = keys.integer("phi3.attention.head_count_kv", heads)
    context = keys.integer("phi3.context_length")
    window = keys.integer("phi3.attention.sliding_window", 0, minimum=0)
    if 0 < window < context:
        keys.problems.append(
            f"phi3.attention.sliding_window is {window}, smaller than the context of {context}: "
            "every layer attends to the whole context here"
        )
    scaling = metadata.get("phi3.rope.scaling.type", "none")
    scaled = [name for name in keys.file.tensors if name.startswith("rope_factors") or ".rope_factors" in name]
    if scaling != "none" or scaled or keys.number("phi3.rope.scaling.factor", 1.0) != 1:
        keys.problems.append(f"its rotation is scaled (phi3.rope.scaling.type {scaling!r}), supported is no scaling")
    if hidden % heads or heads % kv_heads:
        keys.problems.append(f"the widths do not divide: {hidden} over {heads} heads, {heads} over {kv_heads} KV heads")
    elif keys.integer("phi3.rope.dimension_count", hidden // heads) != hidden // heads:
        keys.problems.append(f"phi3.rope.dimension_count is not the head size {hidden // heads}")
    embedding = keys.file.tensors.get("token_embd.weight")
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=keys.integer("phi3.feed_forward_length"),
        num_layers=keys.integer("phi3.block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=1 if embedding is None else embedding.shape[0],
        context_length=context,
        rope_theta=keys.number("phi3.rope.freq_base", 10000.0),
        rms_norm_eps=keys.number("phi3.attention.layer_norm_rms_epsilon"),
    )


def _check_vocabulary(keys: _Keys, size: int) -> None:
    """What llama.cpp reads without asking for its type, or ends the process over."""
    lists = {key: keys.file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type")}
    tokens, merges, types = lists.values()
    if not isinstance(tokens, list) or len(tokens) != size:
        found = f"{len(tokens)} strings" if isinstance(tokens, list) else _shown(tokens)
        keys.problems.append(f"tokenizer.ggml.tokens is {found}, wanted {size}, the rows of token_embd.weight")
    elif len(different := {token for token in tokens if "\0" not in token}) < size:  # which would end a C string
        keys.problems.append(f"tokenizer.ggml.tokens has {size - len(different)} tokens twice or with a NUL")
    if not isinstance(merges, list):
        keys.problems.append(f"tokenizer.ggml.merges is {_shown(merges)}, wanted a list of strings")
    if not isinstance(types, np.ndarray) or types.dtype != np.int32 or len(types) != size:
        keys.problems.append(f"tokenizer.ggml.token_type is not a list of {size} int32")


def _generation(keys: _Keys, vocab_size: int) -> GenerationDefaults:
    eos = keys.integer("tokenizer.ggml.eos_token_id", minimum=0)
    ends = {eos, keys.integer("tokenizer.ggml.eot_token_id", eos, minimum=0)}
    for end in ends:
        if end >= vocab_size:
            keys.problems.append(f"the end token {end} is outside the vocabulary of {vocab_size}")
    return GenerationDefaults(
        eos_token_ids=tuple(sorted(ends, key=lambda end: end != eos)),
        temperature=keys.number("phisight.generation.temperature", DEFAULTS.temperature, zero=True),
        top_p=keys.number("phisight.generation.top_p", DEFAULTS.top_p),
    )


def _vision(keys: _Keys) -> VisionConfig:
    """The tower. The file holds only the layers that the model uses, one fewer than the checkpoint."""
    hidden, heads = keys.integer("clip.vision.embedding_length"), keys.integer("clip.vision.attention.head_count")
    if hidden % heads:
        keys.problems.append(f"the vision tower's width {hidden} is not a multiple of its {heads} heads")
    keys.integer("clip.vision.patch_size", 16)
    keys.integer("clip.vision.image_size", 256)
    keys.expect("clip.vision.patch_size", 16)
    keys.expect("clip.vision.image_size", 256)
    keys.expect("clip.vision.image_mean", [0.5, 0.5, 0.5])
    keys.expect("clip.vision.image_std", [0.5, 0.5, 0.5])
    keys.expect("clip.use_gelu", True)
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=keys.integer("clip.vision.feed_forward_length"),
        num_layers=keys.integer("clip.vision.block_count") + 1,
        num_heads=heads,
        layer_norm_eps=keys.number("clip.vision.attention.layer_norm_epsilon", 1e-6),
    )


def _budget(keys: _Keys) -> ImageBudget:
    """Our own keys, since our files let llama.cpp take pictures of one patch; others say their budget in pixels."""
    area, usual = 256, ImageBudget()
    least = keys.integer("clip.vision.image_min_pixels", usual.min_patches * area)
    most = keys.integer("clip.vision.image_max_pixels", usual.max_patches * area)
    budget = ImageBudget(
        keys.integer("phisight.image.min_patches", max(least // area, 1)),
        keys.integer("phisight.image.max_patches", max(most // area, 1)),
    )
    if budget.min_patches > budget.max_patches or least > most:
        keys.problems.append(f"the fewest patches of an image, {budget.min_patches}, are more than the most")
    return budget


def _text_tensors(c: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (c.vocab_size, c.hidden_size)
    yield "output_norm.weight", (c.hidden_size,)
    yield "output.weight", (c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        yield f"blk.{i}.attn_norm.weight", (c.hidden_size,)
        yield f"blk.{i}.attn_qkv.weight", (c.qkv_size, c.hidden_size)
        yield f"blk.{i}.attn_output.weight", (c.hidden_size, c.hidden_size)
        yield f"blk.{i}.ffn_norm.weight", (c.hidden_size,)
        yield f"blk.{i}.ffn_up.weight", (2 * c.intermediate_size, c.hidden_size)
        yield f"blk.{i}.ffn_down.weight", (c.hidden_size, c.intermediate_size)


def _vision_tensors(c: VisionConfig, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "v.position_embd.weight", (c.table_side**2, c.hidden_size)
    yield from _affine("v.patch_embd", (c.hidden_size, 3, c.patch_size, c.patch_size))
    yield from _affine("mm.0", (width, c.hidden_size))
    yield from _affine("mm.2", (width, width))
    for i in range(c.used_layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from _affine(f"v.blk.{i}.{name}", (c.hidden_size, c.hidden_size))
        yield from _affine(f"v.blk.{i}.ffn_up", (c.intermediate_size, c.hidden_size))
        yield from _affine(f"v.blk.{i}.ffn_down", (c.hidden_size, c.intermediate_size))
        yield from _affine(f"v.blk.{i}.ln1", (c.hidden_size,))
        yield from _affine(f"v.blk.{i}.ln2", (c.hidden_size,))


def _affine(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A weight and its bias, which has one value per row of the weight."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


class _Keys:
    """Typed access to one file's metadata that collects every problem instead of stopping at the first."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.file.metadata.get(key, default)
        self._check_width(key, "<u4")
        if type(value) is not int or not minimum <= value < 2**31:
            self.problems.append(f"{key} is {_shown(value)}, wanted an integer of at least {minimum}")
            return minimum
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.file.metadata.get(key, default)
        self._check_width(key, "<f4")
        if type(value) is not float or not 0 <= value < math.inf or (value == 0 and not zero):
            self.problems.append(f"{key} is {_shown(value)}, wanted a positive number")
            return 1.0
        return float(str(np.float32(value)))  # the shortest number that float32 rounds to the same: 0.8, not 0.80000001

    def expect(self, key: str, wanted: Any) -> None:
        value = self.file.metadata.get(key, wanted)
        found = value.tolist() if isinstance(value, np.ndarray) and value.dtype == np.float32 else value
        if type(found) is not type(wanted) or found != wanted:
            self.problems.append(f"{key} is {_shown(value)}, supported is {wanted}")

    def _check_width(self, key: str, wanted: str) -> None:
        """llama.cpp asks for a type by key, and its vision part ends the process over another one."""
        found = self.file.widths.get(key, wanted)
        if found != wanted:
            self.problems.append(f"{key} is stored as {found[1:]}, wanted is {wanted[1:]}")

    def expect_tensors(self, wanted: Iterator[tuple[str, tuple[int, ...]]]) -> None:
        if self.problems:  # the shapes follow from the numbers found wrong
            return
        held = self.file.tensors
        missing = []
        for name, shape in wanted:
            if name not in held:
                missing.append(name)
                if len(missing) > 2:  # a block_count may be billions
                    break
            elif held[name].shape != shape:
                self.problems.append(f"{name} has the shape {list(held[name].shape)}, wanted {list(shape)}")
        if missing:
            self.problems.append(f"tensors are missing, among them {', '.join(missing)}")

    def raise_problems(self) -> None:
        if self.problems:
            shown = "; ".join(self.problems[:5])
            raise ModelDirError(f"{self.file.path}: {shown}: use a GGUF file of Phi-4-reasoning-vision")


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return repr(value)[:60] if isinstance(value, bool | int | float | str) else "a list"
