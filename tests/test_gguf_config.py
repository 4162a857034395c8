"""The configuration out of GGUF files: ours give the checkpoint's, others what their keys say, wrong ones an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phisight.config import GenerationDefaults, ImageBudget, ModelConfig
from phisight.errors import ModelDirError
from phisight.gguf_config import config_from_gguf
from phisight.gguf_file import GgufFile

Exporter = Callable[..., Path]
Pair = tuple[GgufFile, GgufFile]


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path, exported_gguf: Exporter) -> Pair:
    directory = exported_gguf(tiny_checkpoint, decoder="F32", vision="F32")
    return GgufFile.read(directory / "model-f32.gguf"), GgufFile.read(directory / "mmproj-f32.gguf")


def changed(file: GgufFile, **changes: Any) -> GgufFile:
    """The file with other metadata: `__` in a name stands for a dot, None takes the key away."""
    metadata = file.metadata | {key.replace("__", "."): value for key, value in changes.items()}
    return replace(file, metadata={key: value for key, value in metadata.items() if value is not None})


def test_our_files_give_the_checkpoints_configuration(pair: Pair, tiny_checkpoint: Path) -> None:
    whole = ModelConfig.from_checkpoint(tiny_checkpoint)
    assert config_from_gguf(*pair) == whole
    assert config_from_gguf(pair[0]) == replace(whole, vision=None, images=None)


def test_other_peoples_files(pair: Pair) -> None:
    """Without our keys, with the pixels that llama.cpp's converter writes."""
    text = changed(pair[0], phisight__generation__temperature=None, phisight__generation__top_p=None)
    mmproj = changed(pair[1], phisight__image__min_patches=None, phisight__image__max_patches=None)
    config = config_from_gguf(text, mmproj)
    assert config.generation == GenerationDefaults((265,), 0.8, 0.95)
    assert config.images == ImageBudget(1, 3600)  # our image_min_pixels lets one patch through
    pixels = {"clip__vision__image_min_pixels": 65536, "clip__vision__image_max_pixels": 262144}
    assert config_from_gguf(text, changed(mmproj, **pixels)).images == ImageBudget(256, 1024)
    without = changed(mmproj, **dict.fromkeys(pixels))
    assert config_from_gguf(text, without).images == ImageBudget(256, 3600)


def test_generation(pair: Pair) -> None:
    text = changed(
        pair[0],
        tokenizer__ggml__eot_token_id=257,
        phisight__generation__temperature=0.0,
        phisight__generation__top_p=float(np.float32(0.9)),
    )
    assert config_from_gguf(text).generation == GenerationDefaults((265, 257), 0.0, 0.9)


def test_a_sliding_window_as_long_as_the_context(pair: Pair) -> None:
    assert config_from_gguf(changed(pair[0], phi3__attention__sliding_window=32768)) == config_from_gguf(pair[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "llama"}, "of the architecture 'llama', wanted is 'phi3'"),
        ({"general__architecture": None}, "of the architecture None"),
        ({"general__architecture": "clip"}, "give it as the mmproj"),
        ({"phi3__embedding_length": None}, "phi3.embedding_length is missing, wanted an integer of at least 1"),
        ({"phi3__embedding_length": 0}, "phi3.embedding_length is 0"),
        ({"phi3__embedding_length": "128"}, "phi3.embedding_length is '128'"),
        (
            {"phi3__embedding_length": 132, "phi3__rope__dimension_count": 33},
            "has the shape [352, 128], wanted [352, 132]",
        ),
        ({"phi3__attention__head_count": 3}, "the widths do not divide: 128 over 3 heads"),
        ({"phi3__attention__head_count_kv": np.array([2, 2])}, "phi3.attention.head_count_kv is a list"),
        ({"phi3__attention__sliding_window": 2048}, "phi3.attention.sliding_window is 2048, smaller than the context"),
        ({"phi3__rope__scaling__type": "longrope"}, "its rotation is scaled (phi3.rope.scaling.type 'longrope')"),
        ({"phi3__rope__scaling__factor": 4.0}, "its rotation is scaled"),
        ({"phi3__rope__dimension_count": 24}, "phi3.rope.dimension_count is not the head size 32"),
        ({"phi3__rope__freq_base": 0.0}, "phi3.rope.freq_base is 0.0, wanted a positive number"),
        ({"phi3__attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"phi3__block_count": 5}, "tensors are missing, among them blk.4.attn_norm.weight"),
        ({"phi3__block_count": 2**31 - 1}, "tensors are missing, among them blk.4.attn_norm.weight"),
        ({"phi3__feed_forward_length": 255}, "blk.0.ffn_up.weight has the shape [512, 128], wanted [510, 128]"),
        ({"tokenizer__ggml__tokens": ["a"]}, "tokenizer.ggml.tokens is 1 strings, wanted 352, the rows of token_embd"),
        ({"tokenizer__ggml__tokens": ["a"] * 352}, "tokenizer.ggml.tokens has 351 tokens twice"),
        ({"tokenizer__ggml__tokens": [f"a{n}" for n in range(351)] + ["a\0b"]}, "has 1 tokens twice or with a NUL"),
        ({"tokenizer__ggml__tokens": "a"}, "tokenizer.ggml.tokens is 'a'"),
        ({"tokenizer__ggml__merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer__ggml__token_type": np.ones(352, np.int64)}, "token_type is not a list of 352 int32"),
        ({"tokenizer__ggml__eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        ({"tokenizer__ggml__eos_token_id": 352}, "the end token 352 is outside the vocabulary of 352"),
    ],
)
def test_text_files_that_are_refused(pair: Pair, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelDirError) as caught:
        config_from_gguf(changed(pair[0], **changes), pair[1])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(pair[0].path))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "phi3"}, "give it as the model"),
        ({"clip__projector_type": "pixtral"}, "a projector of type 'pixtral', wanted is 'phi4'"),
        ({"clip__has_vision_encoder": None}, "a projector of type 'phi4', wanted"),
        ({"clip__vision__projection_dim": 5120}, "its image tokens have the width 5120, those of"),
        ({"clip__vision__patch_size": 14}, "clip.vision.patch_size is 14, supported is 16"),
        ({"clip__vision__image_mean": np.zeros(3, np.float32)}, "clip.vision.image_mean is a list, supported is [0.5,"),
        ({"clip__use_gelu": 1}, "clip.use_gelu is 1, supported is True"),
        ({"clip__vision__image_std": np.full(3, 0.5)}, "clip.vision.image_std is a list"),
        ({"clip__use_gelu": False}, "clip.use_gelu is False, supported is True"),
        ({"clip__vision__attention__head_count": 5}, "the vision tower's width 64 is not a multiple of its 5 heads"),
        ({"clip__vision__block_count": 4}, "tensors are missing, among them v.blk.3.attn_q.weight"),
        ({"clip__vision__block_count": 2**31 - 1}, "tensors are missing, among them v.blk.3.attn_q.weight"),
        ({"clip__vision__image_min_pixels": 0}, "clip.vision.image_min_pixels is 0"),
        ({"phisight__image__min_patches": 4000}, "the fewest patches of an image, 4000, are more than the most"),
    ],
)
def test_mmprojs_that_are_refused(pair: Pair, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelDirError) as caught:
        config_from_gguf(pair[0], changed(pair[1], **changes))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(pair[1].path))


@pytest.mark.parametrize(
    ("key", "width"), [("clip.vision.block_count", "<i4"), ("clip.vision.attention.layer_norm_epsilon", "<f8")]
)
def test_numbers_of_another_width(pair: Pair, key: str, width: str) -> None:
    mmproj = replace(pair[1], widths=pair[1].widths | {key: width})
    with pytest.raises(ModelDirError, match=f"{key} is stored as {width[1:]}, wanted is [uf]4"):
        config_from_gguf(pair[0], mmproj)


def test_all_problems_come_together(pair: Pair) -> None:
    text = changed(pair[0], phi3__context_length=None, phi3__attention__layer_norm_rms_epsilon=None)
    with pytest.raises(ModelDirError, match=r"context_length is missing.*layer_norm_rms_epsilon is missing"):
        config_from_gguf(text)
