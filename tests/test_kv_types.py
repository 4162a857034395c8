"""KV caches of other types than the default: what they take, what they cost, and who has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import phisight
from phisight.backends.ort import OrtDecoder
from phisight.cli.main import main
from phisight.disk_cache import DiskCache
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.file_sizes import file_sizes
from phisight.export.int8_kv import MARGIN, int8_kv_graph
from phisight.export.plan import ExportOptions, make_plan
from phisight.loading import checkpoint_directory
from phisight.manifest import INT8_KV_GRAPH
from phisight.model import Model
from phisight.model_cache import CacheIdentity

PRICE = Path(phisight.__file__).parent / "demo/pictures/price.png"
QUESTION = "What does the text say?"


@pytest.fixture(scope="module")
def directory(exported: Callable[..., Path]) -> Path:
    """The built-in model with both types of cache. Read only."""
    return exported(checkpoint_directory("demo"), decoder="f32", vision="f32", kv="int8")


def engine(model: Model) -> OrtDecoder:
    decoder = model._decoder._decoder
    assert isinstance(decoder, OrtDecoder)
    return decoder


def test_info_tells_what_a_token_takes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["kv_bytes_per_token"]
    assert told == {"f32": engine(phisight.load("demo", threads=1)).kv_bytes_per_token}
    assert main(["info", "demo"]) == 0
    assert f"KV cache: {told['f32'] / 1024:g} KiB as f32 a token" in capsys.readouterr().out
    assert main(["info", str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_per_token"] == told | {"int8": told["f32"] // 4}


def test_one_directory_opens_with_either_type(directory: Path) -> None:
    floats, integers = (phisight.load(directory, threads=1, kv_type=kind) for kind in ("f32", "int8"))
    ids = floats.prompt(QUESTION, 1).ids
    patches = [floats.preprocess(PRICE)]
    right, found = floats.score(ids, patches), integers.score(ids, patches)
    difference = np.linalg.norm(found - right) / np.linalg.norm(right)
    assert 1e-4 < difference < 0.1
    assert np.mean(found.argmax(-1) == right.argmax(-1)) > 0.8
    held = [sum(value.numpy().nbytes for pair in engine(each)._cache for value in pair) for each in (floats, integers)]
    assert held[0] == 4 * held[1] == engine(floats).kv_bytes_per_token * len(right)


def test_chunks_and_prefixes_change_nothing(directory: Path) -> None:
    model = phisight.load(directory, threads=1, kv_type="int8")
    ids = [*range(100, 180)]
    whole = model.score(ids, chunk=80)
    np.testing.assert_allclose(model.score(ids, chunk=7), whole, atol=1e-4)
    options = model.options(temperature=0, max_tokens=5)
    first = list(model.generate_tokens(ids, options=options))
    again = model.generate_tokens([*ids[:60], *ids[60:]], options=options)
    assert list(again) == first
    assert again.timings.reused_positions == len(ids) - 1


def test_an_int8_cache_on_disk(directory: Path, tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        model = phisight.load(directory, threads=1, kv_type="int8")
        model.use_cache(DiskCache(tmp_path), CacheIdentity("model", "files"), pictures=True)
        answers.append(model.generate(QUESTION, [PRICE], options=model.options(temperature=0)))
    assert answers[0].text == answers[1].text
    assert answers[0].stats.reused_positions == 0 < answers[1].stats.reused_positions
    other = phisight.load(directory, threads=1)
    state = next(tmp_path.iterdir()).stat().st_size
    assert state < engine(other).kv_bytes_per_token * answers[1].stats.reused_positions


def test_each_channel_has_its_own_scale(directory: Path) -> None:
    graph = onnx.load(str(directory / "decoder.onnx"), load_external_data=False)
    config = phisight.load(directory, threads=1).manifest.model.decoder
    ranges = np.arange(config.num_layers * 2 * config.num_kv_heads * config.head_dim, dtype=np.float32)
    made = int8_kv_graph(graph, ranges.reshape(config.num_layers, 2, config.num_kv_heads, config.head_dim))
    scales = {each.name: onnx.numpy_helper.to_array(each) for each in made.graph.initializer if "kv_scale" in each.name}
    assert len(scales) == 2 * config.num_layers
    last = scales[f"kv_scale.{config.num_layers - 1}.value"]
    assert last.shape == (1, config.num_kv_heads, 1, config.head_dim)
    assert last[0, -1, 0, -1] == pytest.approx(ranges[-1] * MARGIN / 127)
    assert scales["kv_scale.0.key"].min() > 0  # a channel of zeros


def test_the_planned_size_is_the_file_s(directory: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_directory("demo"))
    plan = make_plan(checkpoint.config, ExportOptions(decoder="f32", vision="f32", kv="int8"))
    assert file_sizes(checkpoint, plan)[INT8_KV_GRAPH] == (directory / INT8_KV_GRAPH).stat().st_size


def test_types_that_a_model_does_not_have(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"needs scales measured at export.*--kv int8"):
        phisight.load("demo", kv_type="q8_0")
    assert main(["run", "demo", "hello", "--kv", "int8"]) == 2
    assert "needs scales" in capsys.readouterr().err
    with pytest.raises(InputError, match="kv_type is f16, but .* computes in f32"):
        phisight.load(directory, kv_type="f16")


def test_exports_that_cannot_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="leave one of them out"):
        ExportOptions(kv="int8", decoder="f16", float_type="f16")
    with pytest.raises(InputError, match="leave one of them out"):
        ExportOptions(kv="int8", image_attention="bidirectional")
    assert main(["export", "demo", str(tmp_path / "out"), "--format", "gguf", "--kv", "int8"]) == 2
    assert "--kv does not go with --format gguf" in capsys.readouterr().err


def test_the_command_line_makes_and_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    assert main(["export", "demo", str(out), "--kv", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["kv"] == "int8"
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    for kind in ("int8", "q8_0"):
        assert main(["run", str(out), QUESTION, "--image", str(PRICE), "--temperature", "0", "--kv", kind]) == 0
        assert "6.75" in capsys.readouterr().out
