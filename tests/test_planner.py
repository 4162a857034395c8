"""Plans: sizes as exports write them, memory and times as arithmetic says, budgets, verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phisight.bench.work import chunk_operations, prefill_operations
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, export_onnx, plan_export, plan_gguf
from phisight.export.file_sizes import imagined_checkpoint
from phisight.export.gguf_plan import GgufOptions
from phisight.export.plan import ExportOptions
from phisight.export.probe import probe_config
from phisight.export.variants import CHOICES, all_variants, decoder_kind, model_variant, real_model
from phisight.loading import checkpoint_directory, model_directory
from phisight.manifest import Manifest
from phisight.planner import (
    DecoderRates,
    Rates,
    TowerRates,
    Variant,
    Verdict,
    Workload,
    choose_patches,
    decode_seconds,
    first_token_seconds,
    gpu_share,
    judge,
    judge_pair,
    predict_memory,
    prefill_seconds,
    read_bytes,
    step_seconds,
)
from phisight.planner.memory import pair_needed
from phisight.planner.probe import attention_share

WORK = Workload(443, 1, 3600, 5067)
SLOW = DecoderRates(1e-11, 2e-11, 1e-10, 1e-10)


@pytest.fixture(scope="module")
def real() -> dict[str, Variant]:
    """Variants of the 15B model by kind."""
    return {variant.decoder: variant for variant, _ in all_variants(imagined_checkpoint(real_model()), "15b")}


@pytest.mark.parametrize("options", [*CHOICES, ExportOptions(kv="int8")], ids=decoder_kind)
def test_sizes_are_those_that_an_export_writes(options: ExportOptions | GgufOptions, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_directory("demo"))
    kv = options.kv if isinstance(options, ExportOptions) else None
    planned = {variant.decoder: variant for variant, _ in all_variants(checkpoint, "demo", kv)}[decoder_kind(options)]
    out = tmp_path / "model"
    if isinstance(options, GgufOptions):
        export_gguf(checkpoint, plan_gguf(checkpoint, options), out)
    else:
        export_onnx(checkpoint, plan_export(checkpoint, options), out)
    written = {path.name: path.stat().st_size for path in out.iterdir()}
    assert planned.files.keys() == written.keys()
    assert planned.file_bytes == pytest.approx(sum(written.values()), rel=0.01)
    exported, read = model_variant(Manifest.read(out), "demo")
    assert (exported.decoder, exported.tower) == (planned.decoder, planned.tower)
    assert decoder_kind(read) == decoder_kind(options)
    assert (exported.layer_bytes, exported.head_bytes) == (planned.layer_bytes, planned.head_bytes)
    assert exported.head == planned.head


def test_the_real_model_is_15_billion_weights(real: dict[str, Variant]) -> None:
    weights = sum(entry.weights for entry in real["onnx int4 block 32"].tensors.values())
    assert 15.0e9 < weights < 15.2e9
    assert real["onnx int4 block 32"].file_bytes == pytest.approx(9.2e9, rel=0.02)
    assert real["onnx int4 block 32"].kv_bytes_per_token == 2 * real["gguf q4_0"].kv_bytes_per_token == 400 << 10


def test_memory_grows_with_what_is_asked(real: dict[str, Variant]) -> None:
    for variant in real.values():
        small = predict_memory(variant, Workload(443, 1, 256, 1024))
        large = predict_memory(variant, WORK)
        assert small.opened == large.opened < large.needed + large.idle
        assert large.kv == 5067 * variant.kv_bytes_per_token
        assert small.peak <= large.peak
        assert large.peak >= large.load_peak


def test_larger_blocks_and_repacked_copies_show_in_memory(real: dict[str, Variant]) -> None:
    memory = {kind: predict_memory(variant, WORK) for kind, variant in real.items()}
    assert memory["onnx int4 block 128"].weights < 0.85 * memory["onnx int4 block 32"].weights
    assert memory["gguf q4_0"].weights == memory["gguf q4_0"].idle > 0.7 * memory["gguf q4_0"].mapped
    assert memory["gguf q4_k_m"].weights == memory["gguf q4_k_m"].idle == 0


def test_what_fits_is_said_with_its_reason(real: dict[str, Variant]) -> None:
    needed = predict_memory(real["gguf q8_0"], WORK)
    assert judge(needed, 32 << 30).fits
    tight = judge(needed, 16 << 30)
    assert not tight.fits and "from disk" in tight.reason
    none = judge(predict_memory(real["onnx int8 block 32"], WORK), 16 << 30)
    assert not none.fits and "needs 2" in none.reason


def test_two_engines_take_the_weights_twice() -> None:
    manifest = Manifest.read(model_directory("demo"))
    weights = sum(entry.bytes for entry in manifest.tensors.values() if entry.part in ("decoder", "head"))
    position = 2 * manifest.model.decoder.kv_bytes_per_token(4)
    needed = pair_needed(manifest, 100)
    assert pair_needed(manifest, 300) - needed == 200 * position
    assert needed > 3 * weights + 100 * position
    assert judge_pair(manifest, 100, 2 * needed).fits
    told = f"needs {needed / 1e9:.1f} of {0.9 * needed / 1e9:.1f} GB"
    assert judge_pair(manifest, 100, needed) == Verdict(False, told)


def test_layers_on_a_gpu(real: dict[str, Variant]) -> None:
    assert gpu_share(real["onnx int4 block 32"], WORK, 8 << 30) is None
    shares = [gpu_share(real["gguf q4_0"], WORK, size << 30) for size in (0, 4, 8, 80)]
    counts = [share.layers for share in shares if share is not None]
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] == 40


def test_times_add_up() -> None:
    config = real_model()
    one = prefill_seconds(config, SLOW, 256, 0)
    assert prefill_seconds(config, SLOW, 512, 0) > 2 * one  # the second chunk sees the first
    assert prefill_seconds(config, SLOW, 1, 10**10) > 1.0  # weights are read once at least


def test_a_first_token_takes_images_and_prompt(real: dict[str, Variant]) -> None:
    variant = real["onnx int4 block 32"]
    rates = Rates(2, {variant.decoder: SLOW}, {"w8a8": TowerRates(1e-11, 1e-11)}, 1e-6)
    none, two = (first_token_seconds(variant, rates, Workload(100, images, 256, 2048)) for images in (0, 2))
    assert none == prefill_seconds(variant.config, SLOW, 100, step_seconds(variant, rates))
    assert two > none + 2 * 256 * 1e-6
    assert decode_seconds(variant, rates, 1000) > decode_seconds(variant, rates, 0) == step_seconds(variant, rates)


def test_a_head_of_another_kind_goes_by_its_own_rate(real: dict[str, Variant]) -> None:
    variant = real["onnx int4 block 128"]
    own = Rates(2, {variant.decoder: SLOW}, {}, 0.0)
    quick = Rates(2, {variant.decoder: SLOW, variant.head: replace(SLOW, weights=0.0)}, {}, 0.0)
    gained = step_seconds(variant, own) - step_seconds(variant, quick)
    assert gained == pytest.approx(variant.head_bytes * SLOW.weights)


def test_two_measurements_give_one_and_tell_how_far_they_lie_apart() -> None:
    one = Rates(2, {"a": SLOW}, {"t": TowerRates(2e-12, 0.0)}, 1e-6)
    two = Rates(2, {"a": replace(SLOW, matrices=3 * SLOW.matrices)}, {"t": TowerRates(1e-12, 0.0)}, 3e-6)
    assert one.between(two).decoders["a"].matrices == pytest.approx(2 * SLOW.matrices)
    assert one.between(two).prepare == pytest.approx(2e-6)
    assert one.drift(two) == two.drift(one) == pytest.approx(3)
    assert one.drift(one) == 1


def test_what_grows_with_the_square_is_told_from_the_rest() -> None:
    def seconds(n: int) -> float:
        return 3e-3 * n + 2e-6 * n * n

    even, unit = attention_share(seconds(256), seconds(1024), 4, (256**2, 1024**2))
    assert (even, unit) == pytest.approx((3e-3 * 256, 2e-6))
    assert attention_share(1.0, 3.0, 4, (1, 16)) == (1.0, 0.0)  # turned round by noise


@pytest.mark.parametrize(("target", "patches"), [(1.0, 256), (2.0, 512), (2.004, 513), (100.0, 3600)])
def test_the_largest_budget_below_the_target(target: float, patches: int) -> None:
    choice = choose_patches(lambda n: n / 256, 256, 3600, target)
    assert choice.patches == patches
    assert choice.seconds <= target


def test_a_target_that_nothing_meets_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="256 patches"):
        choose_patches(lambda n: n / 256, 256, 3600, 0.5)


def test_a_probe_is_as_wide_and_small() -> None:
    real = real_model().decoder
    d = probe_config(real_model()).decoder
    assert (d.hidden_size, d.intermediate_size, d.num_heads) == (real.hidden_size, real.intermediate_size, 40)
    assert d.num_layers == 1 and d.vocab_size < 2000
    demo = Checkpoint.open(checkpoint_directory("demo")).config
    assert replace(probe_config(demo).decoder, vocab_size=0) == replace(demo.decoder, vocab_size=0)


def test_work_is_that_of_the_matrices() -> None:
    d = real_model().decoder
    layer = d.hidden_size * (7680 + 5120 + 3 * 17920)
    head = d.hidden_size * d.vocab_size
    assert prefill_operations(d, 1) == pytest.approx(2 * (40 * layer + head))
    assert chunk_operations(d, 10) == pytest.approx(20 * (39 * layer + d.hidden_size * 7680))


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("1.5 GiB", 3 << 29), ("512m", 512 * 10**6)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_bytes("--memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "16 gigs"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        read_bytes("--memory", text)
