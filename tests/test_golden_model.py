"""The float32 export against numbers from the official reference code: features, logits, greedy tokens.

The reference's own error is about 1e-5 (features) and 1.5e-5 (logits, which reach 11); the smallest greedy margin is
0.0127.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import phisight
from phisight.config import DecoderConfig, GenerationDefaults, ModelConfig
from phisight.export.checkpoint import Checkpoint
from phisight.export.onnx_decoder import rotation_tables
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_layers import ArrayJob, LayerBuilder
from phisight.export.onnx_vision import _position_embedding
from phisight.export.onnx_writer import write_graph
from phisight.export.output import OutputDirectory
from phisight.export.plan import ExportOptions, make_plan
from phisight.manifest import Manifest
from phisight.naflex import Patches
from phisight.tokenizer import Tokenizer

FEATURES = 1e-4
LOGITS = 3e-4
CASES = ("text_only", "micro_64x48", "micro_two", "img_250x250", "img_320x240", "png_template", "two_images")
EOS = 265

Exporter = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """One prompt of the reference, and what it gave: `answer` up to the end token, `greedy` running on past it."""

    prompt: str
    ids: list[int]
    images: list[Patches]
    answer: list[int]
    greedy: list[int]
    arrays: dict[str, NDArray[Any]] = field(repr=False)


@pytest.fixture(scope="module")
def cases(golden: Path, synthetic_image: Callable[..., Any]) -> dict[str, Case]:
    found = {}
    for record in json.loads((golden / "tiny_golden/cases.json").read_text()):
        limits = (64, 4) if record["processor"] == "micro" else (3600, 256)
        images = []
        for source, grid in zip(record["images"], record.get("spatial_shapes", []), strict=True):
            picture = next((golden / "images").glob("*.png")) if source == "png" else synthetic_image(*source)
            images.append(phisight.preprocess(picture, *limits))
            assert images[-1].grid == tuple(grid)
        with np.load(golden / f"tiny_golden/{record['name']}.npz") as file:
            arrays = dict(file)
        found[record["name"]] = Case(
            record["prompt"],
            arrays["input_ids"].tolist(),
            images,
            [token for token in record["generate_tokens"] if token != EOS],
            record["greedy_tokens_no_cache_no_eos"],
            arrays,
        )
    assert tuple(found) == CASES
    return found


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, exported: Exporter) -> phisight.Model:
    return phisight.load(exported(tiny_checkpoint, decoder="f32"), threads=2)


def _generate(model: phisight.Model, ids: list[int], images: list[Patches], **options: Any) -> list[int]:
    greedy = phisight.GenerateOptions(temperature=0, **{"max_tokens": 24} | options)
    return [token.token_id for token in model.generate_tokens(ids, images, greedy)]


@pytest.mark.parametrize("name", CASES)
def test_ids(cases: dict[str, Case], tiny_checkpoint: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(tiny_checkpoint / "tokenizer.json")
    pieces = [tokenizer.encode(piece, parse_special=True) for piece in cases[name].prompt.split("<image>")]
    ids = pieces[0] + [id_ for piece in pieces[1:] for id_ in [-200, *piece]]
    assert ids == cases[name].ids


@pytest.mark.parametrize("name", CASES[1:])
def test_image_features(cases: dict[str, Case], model: phisight.Model, name: str) -> None:
    for j, image in enumerate(cases[name].images):
        wanted = cases[name].arrays[f"img{j}/projected"]
        features = model.encode_image(image)
        assert features.shape == (image.num_patches, 128)
        if image.num_patches > 300:  # there the golden file holds every 16th row
            features = features[::16]
        np.testing.assert_allclose(features, wanted, rtol=0, atol=FEATURES)


def test_pixels_are_the_references(cases: dict[str, Case]) -> None:
    for j, image in enumerate(cases["micro_two"].images):
        np.testing.assert_array_equal(image.pixel_values, cases["micro_two"].arrays[f"img{j}/pixel_values"])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(cases: dict[str, Case], model: phisight.Model, name: str) -> None:
    """The reference's 24 tokens are read along, so that one pass tells every one of them."""
    case = cases[name]
    logits = model.score([*case.ids, *case.greedy[:-1]], case.images)
    length = len(case.ids) + sum(image.num_patches - 1 for image in case.images)
    assert len(logits) == length + 23
    if "logits_all" in case.arrays:
        np.testing.assert_allclose(logits[:length], case.arrays["logits_all"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(logits[:4], case.arrays["logits_first4"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(logits[length - 8 : length], case.arrays["logits_last8"], rtol=0, atol=LOGITS)
    assert logits[length - 1 :].argmax(axis=-1).tolist() == case.greedy
    top = np.sort(logits[length - 1 :], axis=-1)
    np.testing.assert_allclose(top[:, -1] - top[:, -2], case.arrays["greedy_margins"], rtol=0, atol=2 * LOGITS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1 << 20, 256, 7])
def test_generation(cases: dict[str, Case], model: phisight.Model, name: str, chunk: int) -> None:
    """All at once and in chunks that cut images and text anywhere, each without anything cached."""
    case = cases[name]
    model.score([0])  # the cache now holds another sequence
    assert _generate(model, case.ids, case.images, prefill_chunk=chunk) == case.answer


def test_generation_one_position_at_a_time(cases: dict[str, Case], model: phisight.Model) -> None:
    case = cases["micro_two"]
    model.score([0])
    assert _generate(model, case.ids, case.images, prefill_chunk=1) == case.answer


def test_generation_ends_at_the_end_token_only(cases: dict[str, Case], model: phisight.Model) -> None:
    case = cases["png_template"]
    assert case.greedy[0] == EOS
    generation = model.generate_tokens(case.ids, case.images, phisight.GenerateOptions(temperature=0, max_tokens=24))
    assert list(generation) == []
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("chunk", [256, 5])
def test_kv_reuse(cases: dict[str, Case], model: phisight.Model, chunk: int) -> None:
    """A request that begins as the last one runs only the rest, and gives the reference's tokens all the same."""
    one, two = cases["micro_64x48"], cases["micro_two"]
    shared = 6 + 12 + 1  # both begin with 6 ids, the same image of 12 patches, and a newline
    options = phisight.GenerateOptions(temperature=0, max_tokens=24, prefill_chunk=chunk)

    def run(ids: list[int], images: list[Patches]) -> tuple[list[int], int]:
        generation = model.generate_tokens(ids, images, options)
        return [token.token_id for token in generation], generation.timings.reused_positions

    model.score([0])
    assert run(one.ids, one.images) == (one.answer, 0)
    assert run(two.ids, two.images) == (two.answer, shared)
    # The conversation goes on behind 10 tokens of the answer: only the last of them is run again.
    tokens, reused = run([*two.ids, *two.answer[:10]], two.images)
    assert (tokens[:14], reused) == (two.answer[10:], 102 + 9)
    # Back to the first: what is behind the common prefix is forgotten.
    assert run(one.ids, one.images) == (one.answer, shared)


@pytest.fixture
def sharded_checkpoint(golden: Path, checkpoint_copy: Path) -> Path:
    """The same weights in two shards with an index."""
    (checkpoint_copy / "model.safetensors").unlink()
    for file in (golden / "tiny_model_sharded").iterdir():
        shutil.copyfile(file, checkpoint_copy / file.name)
    return checkpoint_copy


def test_the_sharded_checkpoint(
    cases: dict[str, Case], tiny_checkpoint: Path, sharded_checkpoint: Path, exported: Exporter
) -> None:
    out = exported(sharded_checkpoint, decoder="f32")
    assert Manifest.read(out).files == Manifest.read(exported(tiny_checkpoint, decoder="f32")).files
    model = phisight.load(out, threads=2)
    for name in ("text_only", "micro_two"):
        assert _generate(model, cases[name].ids, cases[name].images) == cases[name].answer


def test_position_embedding(golden: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The table resized in the graph, for square, long, single-row, single-column and single-patch grids."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    vision = checkpoint.config.vision
    assert vision is not None
    graph = GraphBuilder("positions", "positions.onnx.data")
    layers = LayerBuilder(graph, make_plan(checkpoint.config, ExportOptions(decoder="f32")), "f32")
    resized = _position_embedding(layers, vision, graph.input("grid", "int64", [2]))
    graph.output(resized, "float32", ["patches", vision.hidden_size])
    write_graph(graph, layers.jobs, checkpoint, OutputDirectory(tmp_path), lambda weights: None)
    session = onnxruntime.InferenceSession(tmp_path / "positions.onnx", providers=["CPUExecutionProvider"])

    with np.load(golden / "tiny_golden/posemb.npz") as tables:
        names = [name for name in tables.files if name[0].isdigit() and not name.endswith("BUG")]
        assert {"1x1", "180x1", "3600x1", "16x16", "60x60", "1x256"} <= set(names)
        for name in names:
            rows, columns = map(int, name.split("x"))
            found = session.run(None, {"grid": np.array([rows, columns], np.int64)})[0]
            assert len(found) == rows * columns
            if rows * columns >= 1000:  # there the golden file holds every 7th row
                found = found[::7]
            np.testing.assert_allclose(found, tables[name], rtol=0, atol=1e-5, err_msg=name)
        table = tables["table_16x16"].reshape(256, -1)
        np.testing.assert_array_equal(session.run(None, {"grid": np.array([16, 16], np.int64)})[0], table)


def test_rotation_tables(golden: Path) -> None:
    """Heads of 128 and theta 500000, as in the real model."""
    config = DecoderConfig(256, 256, 1, 2, 1, 352, 32768, 500000.0, 1e-5)
    whole = ModelConfig(config, None, None, GenerationDefaults((EOS,)))
    layers = LayerBuilder(GraphBuilder("rotation", ""), make_plan(whole, ExportOptions(decoder="f32")), "f32")
    rotation_tables(layers, config)
    cosine, sine = (job.array for job in layers.jobs if isinstance(job, ArrayJob))
    assert cosine.shape == sine.shape == (32768, 64)
    with np.load(golden / "rope_real.npz") as wanted:
        at = wanted["positions"]
        assert at.max() > 8192
        for half in (slice(0, 64), slice(64, 128)):  # the reference repeats the angles for the second half
            np.testing.assert_allclose(cosine[at], wanted["cos"][:, half], rtol=0, atol=1e-6)
            np.testing.assert_allclose(sine[at], wanted["sin"][:, half], rtol=0, atol=1e-6)
