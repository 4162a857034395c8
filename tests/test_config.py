"""config.json and its neighbours: what is read, and what is rejected by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig
from phisight.errors import ConfigError

REMOVED = object()


def _change(directory: Path, file: str, changes: dict[str, Any]) -> None:
    """Set keys of a JSON file, or take them out; a dot leads into a section."""
    data = json.loads((directory / file).read_text())
    for key, value in changes.items():
        section = data
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    (directory / file).write_text(json.dumps(data))


def _error(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_checkpoint(tiny_checkpoint: Path) -> None:
    assert ModelConfig.from_checkpoint(tiny_checkpoint) == ModelConfig(
        decoder=DecoderConfig(
            hidden_size=128,
            intermediate_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=352,
            context_length=32768,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
        ),
        vision=VisionConfig(64, 128, 4, 4),
        images=ImageBudget(256, 3600),
        generation=GenerationDefaults((265,), 0.8, 0.95),
    )


def test_derived_sizes() -> None:
    """The real model: 200 KiB a position in float16, as 2 x 40 layers x 10 heads x 128 x 2 bytes."""
    decoder = DecoderConfig(5120, 17920, 40, 40, 10, 100352, 32768, 500000.0, 1e-5)
    assert decoder.head_dim == 128
    assert decoder.qkv_size == 7680
    assert decoder.kv_bytes_per_token(2) == 200 << 10
    assert VisionConfig(1152, 4304, 27, 16).used_layers == 26
    assert VisionConfig(1152, 4304, 27, 16).patch_dim == 768


def test_the_towers_defaults_are_siglip2s(golden: Path, checkpoint_copy: Path) -> None:
    """The real config.json says little of the vision tower: the rest are the class's defaults."""
    changes: dict[str, Any] = {"vision_config": {"model_type": "siglip2_vision_model"}, "mm_hidden_size": 1152}
    _change(checkpoint_copy, "config.json", changes)
    vision = ModelConfig.from_checkpoint(checkpoint_copy).vision
    wanted = json.loads((golden / "real_effective_vision_config.json").read_text())
    assert vision is not None
    assert vision.hidden_size == wanted["hidden_size"] == 1152
    assert vision.intermediate_size == wanted["intermediate_size"] == 4304
    assert vision.num_layers == wanted["num_hidden_layers"] == 27
    assert vision.num_heads == wanted["num_attention_heads"] == 16
    assert vision.layer_norm_eps == wanted["layer_norm_eps"] == 1e-6
    assert vision.patch_size == wanted["patch_size"] == 16
    assert vision.table_side**2 == wanted["num_patches"] == 256


REJECTED: list[tuple[str, Any, str]] = [
    ("rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "rope_scaling .*'longrope'"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling .*'yarn'"),
    ("rope_scaling", "linear", "rope_scaling is 'linear'"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 5e5}, 'rope_type is "dynamic"'),
    ("sliding_window", 2047, "sliding_window is 2047, .*32768"),
    ("tie_word_embeddings", "yes", 'tie_word_embeddings is "yes", supported is false or true'),
    ("hidden_act", "gelu", 'hidden_act is "gelu", supported is "silu"'),
    ("attention_bias", True, "attention_bias is true"),
    ("partial_rotary_factor", 0.75, "partial_rotary_factor is 0.75"),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config .*already quantised"),
    ("head_dim", 64, "head_dim is 64, supported is null or 32"),
    ("num_attention_heads", 3, "hidden_size 128 is not a multiple of num_attention_heads 3"),
    ("num_attention_heads", 32, "head size 4 is not a multiple of 8"),
    ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("hidden_size", REMOVED, "hidden_size is missing"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0, wanted an integer of at least 1"),
    ("intermediate_size", "256", "intermediate_size is '256'"),
    ("vocab_size", True, "vocab_size is True"),
    ("rms_norm_eps", 0, "rms_norm_eps is 0, wanted a positive number"),
    ("rope_theta", float("inf"), "rope_theta is inf"),
    ("use_s2", True, "use_s2 is true"),
    ("use_mm_proj", False, "use_mm_proj is false"),
    ("mm_projector_type", "linear", 'mm_projector_type is "linear"'),
    ("mm_hidden_size", 1152, "mm_hidden_size is 1152, supported is 64"),
    ("vision_config", 3, "vision_config is 3, wanted an object"),
    ("vision_config.model_type", "siglip_vision_model", 'model_type is "siglip_vision_model"'),
    ("vision_config.hidden_act", "gelu", 'hidden_act is "gelu", supported is "gelu_pytorch_tanh"'),
    ("vision_config.patch_size", 14, "patch_size is 14, supported is 16"),
    ("vision_config.num_patches", 729, "num_patches is 729, supported is 256"),
    ("vision_config.num_attention_heads", 5, "vision hidden_size 64 is not a multiple of its heads 5"),
    ("vision_config.num_hidden_layers", 1, "num_hidden_layers is 1, wanted an integer of at least 2"),
    ("architectures", ["LlamaForCausalLM"], r'architectures is \["LlamaForCausalLM"\].*Phi4ForCausalLMV'),
    ("architectures", REMOVED, "architectures is null"),
]


@pytest.mark.parametrize(("key", "value", "message"), REJECTED)
def test_what_is_not_supported_is_named(checkpoint_copy: Path, key: str, value: object, message: str) -> None:
    _change(checkpoint_copy, "config.json", {key: value})
    error = _error(checkpoint_copy)
    assert str(checkpoint_copy / "config.json") in error
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_checkpoint(checkpoint_copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("min_num_patches", 4000, "min_num_patches 4000 is larger than max_num_patches 3600"),
        ("max_num_patches", 0, "max_num_patches is 0"),
        ("resample", 3, "resample is 3, supported is 2"),
        ("image_mean", [0.48, 0.46, 0.41], "image_mean"),
        ("image_std", [0.27, 0.26, 0.28], "image_std"),
        ("do_normalize", False, "do_normalize is false"),
        ("patch_size", 14, "patch_size is 14"),
    ],
)
def test_preprocessing_that_is_not_the_models(checkpoint_copy: Path, key: str, value: object, message: str) -> None:
    _change(checkpoint_copy, "preprocessor_config.json", {key: value})
    assert message in _error(checkpoint_copy)


def test_all_problems_in_one_line(checkpoint_copy: Path) -> None:
    changes = {"hidden_act": "gelu", "sliding_window": 2047, "use_s2": True, "intermediate_size": REMOVED}
    _change(checkpoint_copy, "config.json", changes)
    _change(checkpoint_copy, "preprocessor_config.json", {"min_num_patches": 4000})
    _change(checkpoint_copy, "generation_config.json", {"eos_token_id": None})
    error = _error(checkpoint_copy)
    for part in ("hidden_act", "sliding_window", "use_s2", "intermediate_size", "min_num_patches", "eos_token_id"):
        assert part in error


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 262144},  # wider than the context: no position is ever out of reach
        {"head_dim": 32},
        {"rope_theta": REMOVED, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"sliding_window": REMOVED, "rope_scaling": REMOVED, "partial_rotary_factor": REMOVED},
    ],
)
def test_other_ways_to_say_the_same(tiny_checkpoint: Path, checkpoint_copy: Path, changes: dict[str, Any]) -> None:
    _change(checkpoint_copy, "config.json", changes)
    assert ModelConfig.from_checkpoint(checkpoint_copy) == ModelConfig.from_checkpoint(tiny_checkpoint)


def test_the_image_budget_may_stand_in_config_json(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "preprocessor_config.json").unlink()
    _change(checkpoint_copy, "config.json", {"max_num_patches": 1024})
    assert ModelConfig.from_checkpoint(checkpoint_copy).images == ImageBudget(256, 1024)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [({"eos_token_id": 265}, (265,)), ({"eos_token_id": [257, 265]}, (257, 265)), ({"eos_token_id": REMOVED}, (265,))],
)
def test_end_tokens(checkpoint_copy: Path, found: dict[str, Any], wanted: tuple[int, ...]) -> None:
    """One id or several; config.json has them where generation_config.json does not."""
    _change(checkpoint_copy, "generation_config.json", found)
    assert ModelConfig.from_checkpoint(checkpoint_copy).generation.eos_token_ids == wanted


@pytest.mark.parametrize("eos", [None, [], "265", [-1], [True], [265, "x"]])
def test_end_tokens_that_are_none(checkpoint_copy: Path, eos: object) -> None:
    _change(checkpoint_copy, "generation_config.json", {"eos_token_id": eos})
    assert f"eos_token_id is {eos!r}" in _error(checkpoint_copy)


def test_no_end_token_anywhere(checkpoint_copy: Path) -> None:
    _change(checkpoint_copy, "generation_config.json", {"eos_token_id": REMOVED})
    _change(checkpoint_copy, "config.json", {"eos_token_id": REMOVED})
    assert "eos_token_id is None" in _error(checkpoint_copy)


def test_an_end_token_outside_the_vocabulary(checkpoint_copy: Path) -> None:
    """The real model's id in a small one: no answer would ever end."""
    _change(checkpoint_copy, "generation_config.json", {"eos_token_id": [265, 100265]})
    assert "eos_token_id 100265 is outside the vocabulary of 352" in _error(checkpoint_copy)


def test_sampling_defaults(checkpoint_copy: Path) -> None:
    _change(checkpoint_copy, "generation_config.json", {"temperature": 0.5, "top_p": REMOVED})
    assert ModelConfig.from_checkpoint(checkpoint_copy).generation == GenerationDefaults((265,), 0.5, 0.95)
    _change(checkpoint_copy, "generation_config.json", {"do_sample": False})
    assert ModelConfig.from_checkpoint(checkpoint_copy).generation == GenerationDefaults((265,), 0.0, 1.0)


def test_a_text_only_checkpoint(checkpoint_copy: Path) -> None:
    _change(checkpoint_copy, "config.json", {"architectures": ["Phi3ForCausalLM"], "vision_config": REMOVED})
    config = ModelConfig.from_checkpoint(checkpoint_copy)
    assert config.vision is None
    assert config.images is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"\xff\xfe{}", "cannot be read as JSON"), (b"[1]", "holds a list")],
)
def test_a_configuration_that_is_no_json_object(checkpoint_copy: Path, content: bytes, message: str) -> None:
    (checkpoint_copy / "config.json").write_bytes(content)
    assert message in _error(checkpoint_copy)


def test_a_configuration_that_is_not_there(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").unlink()
    assert "config.json is missing" in _error(checkpoint_copy)
    assert "is a file" in _error(checkpoint_copy / "model.safetensors")
