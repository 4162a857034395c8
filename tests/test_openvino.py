"""OpenVINO beside ONNX Runtime on the same directories: equal answers, a cache that can be cut, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight import onnx_engines
from phisight.backends.openvino import LEAST_GAPS, OpenVinoDecoder, import_openvino
from phisight.backends.ort import OrtDecoder
from phisight.backends.paired import LEAST_CHUNK, PairedDecoder
from phisight.cli.main import main
from phisight.devices import choose_device, engine_devices
from phisight.errors import EngineError, InputError
from phisight.loading import checkpoint_directory
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt import Mode

pytest.importorskip("openvino", reason='OpenVINO is not installed: pip install "phisight[openvino]"')

Exporter = Callable[..., Path]

DEMO = checkpoint_directory("demo")
PICTURES = sorted((Path(phisight.__file__).parent / "demo/pictures").glob("*.png"))
QUESTIONS = ("What does the text say?", "Where is the save button?", "What is 17 + 25?")
TOLERANCE = 1e-4
GREEDY = GenerateOptions(temperature=0, max_tokens=40)


def opened(directory: str | Path, device: str = "openvino") -> Model:
    return phisight.load(directory, device=device, threads=1, accuracy_level=0)


def engine(model: Model) -> OpenVinoDecoder:
    decoder = model._decoder._decoder
    assert isinstance(decoder, OpenVinoDecoder)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> OpenVinoDecoder:
    return engine(opened("demo"))


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "f32", "vision": "f32"},
        {"decoder": "int4", "vision": "int8"},
        {"decoder": "int4", "block_size": 128, "head": "f32"},
        {"decoder": "int4", "asymmetric": True},
    ],
    ids=str,
)
def test_logits_and_answers_are_those_of_onnx_runtime(exported: Exporter, options: dict[str, Any]) -> None:
    directory = exported(DEMO, **options)
    theirs, ours = opened(directory, "cpu"), opened(directory)
    for question, picture in zip(QUESTIONS, PICTURES, strict=False):
        patches = [ours.preprocess(picture)]
        ids = ours.prompt(question, 1).ids
        np.testing.assert_allclose(ours.score(ids, patches), theirs.score(ids, patches), atol=TOLERANCE)
        for mode in get_args(Mode):
            found, right = (model.generate(question, [picture], mode=mode, options=GREEDY) for model in (ours, theirs))
            assert (found.thought, found.text) == (right.thought, right.text)


@pytest.mark.parametrize("block_size", [32, 128])
def test_rounding_costs_no_more_than_onnx_runtimes(exported: Exporter, block_size: int) -> None:
    """Level 4: as many activations share a scale as weights do."""
    directory = exported(DEMO, decoder="int4", block_size=block_size)
    models = {device: phisight.load(directory, device=device, threads=1) for device in ("cpu", "openvino")}
    assert models["cpu"].manifest.least_block == block_size
    exact = opened(directory, "cpu")
    ids, patches = exact.prompt(QUESTIONS[0], 1).ids, [exact.preprocess(PICTURES[0])]
    right = exact.score(ids, patches)
    errors = {device: np.linalg.norm(model.score(ids, patches) - right) for device, model in models.items()}
    assert 0 < errors["openvino"] < 1.2 * errors["cpu"]


def test_cutting_the_cache_is_as_if_it_had_never_been(decoder: OpenVinoDecoder) -> None:
    """Gaps are masked, and taken out once they are many."""
    rng = np.random.default_rng(0)
    kept: list[int] = []
    decoder.truncate(0)
    taken_out = 0
    for _ in range(60):
        length = int(rng.integers(1, min(len(kept) + 2, 60)))
        decoder.truncate(length)
        before = len(decoder._counts)
        ids = rng.integers(0, 256, int(rng.integers(1, 50)), np.int32)
        kept = [*kept[:length], *ids.tolist()]
        found = decoder.append([ids], "all").copy()
        assert decoder.length == len(kept)
        fresh = decoder.fork()
        right = fresh.append([np.array(kept, np.int32)], "all")[-len(ids) :]
        np.testing.assert_allclose(found, right, atol=TOLERANCE)
        assert len(decoder._counts) - decoder.length <= max(LEAST_GAPS, decoder.length)
        taken_out += len(decoder._counts) < before
    assert taken_out > 1


def test_one_cache_for_each_fork(decoder: OpenVinoDecoder) -> None:
    first, second = np.arange(30, dtype=np.int32), np.arange(50, 90, dtype=np.int32)
    twin = decoder.fork()
    decoder.truncate(0)
    decoder.append([first])
    twin.append([second])
    mine, its = decoder.append([first[:1]]).copy(), twin.append([second[:1]]).copy()
    alone = decoder.fork()
    np.testing.assert_allclose(alone.append([np.append(first, first[:1])]), mine, atol=TOLERANCE)
    alone.truncate(0)
    np.testing.assert_allclose(alone.append([np.append(second, second[:1])]), its, atol=TOLERANCE)


def test_a_saved_cache_is_the_one_that_onnx_runtime_saves(decoder: OpenVinoDecoder) -> None:
    theirs = opened("demo", "cpu")._decoder._decoder
    assert isinstance(theirs, OrtDecoder)
    ids = np.arange(40, dtype=np.int32)
    decoder.truncate(0)
    decoder.append([np.append(ids[:20], ids[:9])])
    decoder.truncate(20)  # the gap is not saved
    decoder.append([ids[20:]])
    theirs.append([ids])
    states = [np.frombuffer(each.state_save(), np.float32) for each in (decoder, theirs)]
    np.testing.assert_allclose(*states, atol=TOLERANCE)
    right = theirs.append([ids[:1]])
    twin = decoder.fork()
    twin.state_load(states[1].tobytes())
    np.testing.assert_allclose(twin.append([ids[:1]]), right, atol=TOLERANCE)
    with pytest.raises(InputError, match="a position"):
        twin.state_load(b"123")


def test_chunks_here_and_steps_there(exported: Exporter) -> None:
    """OpenVINO for chunks and ONNX Runtime for steps, through cutting, saving and loading: what either alone gives."""
    directory = exported(DEMO, decoder="int4", vision="int8")
    paired = opened(directory, "openvino+cpu")
    assert any("in memory twice" in note for note in paired.notes)
    both, alone = paired._decoder._decoder, opened(directory, "cpu")._decoder._decoder
    assert isinstance(both, PairedDecoder) and isinstance(alone, OrtDecoder)
    rng = np.random.default_rng(0)
    chunks = 0
    for _ in range(40):
        length = int(rng.integers(0, alone.length + 1))
        count = int(rng.choice([1, 1, 5, LEAST_CHUNK - 1, LEAST_CHUNK, 70]))
        for decoder in (both, alone):
            decoder.truncate(length)
        if rng.random() < 0.2 and length:
            state = both.state_save()
            both = both.fork()
            both.state_load(state)
        ids = [rng.integers(0, 256, count, np.int32)]
        np.testing.assert_allclose(both.append(ids, "all").copy(), alone.append(ids, "all"), atol=TOLERANCE)
        assert both.length == alone.length == length + count
        chunks += count >= LEAST_CHUNK
    assert 5 < chunks < 35
    states = [np.frombuffer(each.state_save(), np.float32) for each in (both, alone)]
    np.testing.assert_allclose(*states, atol=TOLERANCE)
    right = opened(directory, "cpu").generate(QUESTIONS[0], [PICTURES[0]], options=GREEDY)
    assert paired.generate(QUESTIONS[0], [PICTURES[0]], options=GREEDY).text == right.text


@pytest.mark.parametrize(("engine", "count"), [("_chunks", LEAST_CHUNK), ("_steps", 1)])
def test_a_pair_of_which_one_fails_forgets(
    exported: Exporter, monkeypatch: pytest.MonkeyPatch, engine: str, count: int
) -> None:
    paired = opened(exported(DEMO, decoder="int4", vision="int8"), "openvino+cpu")._decoder._decoder
    assert isinstance(paired, PairedDecoder)
    ids = np.arange(LEAST_CHUNK, dtype=np.int32)
    right = paired.append([ids]).copy()

    def fail(*args: Any, **options: Any) -> None:
        raise EngineError("no more")

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="no more"):
        patch.setattr(getattr(paired, engine), "append", fail)
        paired.append([ids[:count]])
    assert paired.length == 0
    np.testing.assert_allclose(paired.append([ids]), right, atol=TOLERANCE)


def test_an_image_as_one_chunk(exported: Exporter) -> None:
    """A causal export is enough, and gives what ONNX Runtime does with one made for it."""
    theirs = phisight.load(
        exported(DEMO, decoder="f32", vision="f32", image_attention="bidirectional"),
        device="cpu",
        threads=1,
        image_attention="bidirectional",
    )
    ours = phisight.load(
        exported(DEMO, decoder="f32", vision="f32"), device="openvino", threads=1, image_attention="bidirectional"
    )
    patches, ids = [ours.preprocess(PICTURES[0])], ours.prompt(QUESTIONS[0], 1).ids
    np.testing.assert_allclose(ours.score(ids, patches), theirs.score(ids, patches), atol=TOLERANCE)


def test_a_run_that_fails_leaves_nothing_behind(decoder: OpenVinoDecoder) -> None:
    twin = decoder.fork()
    ids = np.arange(9, dtype=np.int32)
    right: NDArray[np.float32] = twin.append([ids]).copy()

    class Failing:
        def __init__(self, request: Any) -> None:
            self.reset_state = request.reset_state

        def infer(self, feed: object) -> object:
            raise RuntimeError("out of memory")

    working = twin._request
    twin._request = Failing(working)
    with pytest.raises(EngineError, match="OpenVINO failed in the decoder: out of memory"):
        twin.append([ids])
    twin._request = working
    assert twin.length == 0
    np.testing.assert_array_equal(twin.append([ids]), right)


def test_what_cannot_be_run_is_refused(exported: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="needs a float32 model, this one is f16"):
        choose_device("openvino", "f16")
    with pytest.raises(InputError, match="wanted auto, cpu, cuda, webgpu, openvino"):
        choose_device("openvino:", "f32")
    with pytest.raises(InputError, match="export without --image-attention bidirectional"):
        opened(exported(DEMO, decoder="f32", vision="f32", image_attention="bidirectional"))
    with pytest.raises(InputError, match="int8, which OpenVINO cannot read"):
        phisight.load(exported(DEMO, decoder="f32", vision="f32", kv="int8"), device="openvino", kv_type="int8")
    with pytest.raises(EngineError, match="OpenVINO finds no TPU here, only CPU"):
        opened("demo", "openvino:TPU")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"phisight\[openvino\]"):
        import_openvino()
    assert engine_devices()[1].devices == ()


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "demo", QUESTIONS[0], "--image", str(PICTURES[0]), "--temperature", "0", "--mode", "nothink"]
    answers = []
    for device in ("cpu", "openvino"):
        assert main([*command, "--device", device, "--no-cache"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    assert main([*command, "--device", "tpu"]) == 2
    assert "device is 'tpu', wanted auto" in capsys.readouterr().err
    assert main(["info", "--devices"]) == 0
    assert "OpenVINO: openvino:CPU" in capsys.readouterr().out
    assert engine_devices()[1].devices[0] == "openvino:CPU"


def test_bench_times_the_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "demo", "--against", "openvino", "--runs", "1", "--json"]
    assert main([*command, "--stages", "encode_256,prefill,decode"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {name: row["other_best"] for name, row in report["stages"].items()} == {
        "encode_256": None,
        "prefill": "OpenVINO",
        "decode": "OpenVINO",
    }
    assert [each["engine"] for each in report["contenders"]] == ["onnxruntime", "openvino"]
    assert main([*command, "--stages", "encode_256"]) == 2
    assert "openvino times the decoder" in capsys.readouterr().err
    assert main([*command, "--device", "openvino+cpu"]) == 2
    assert "--device cpu, not openvino+cpu" in capsys.readouterr().err


def test_bench_times_both_engines_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "demo", "--device", "openvino+cpu", "--runs", "1", "--json"]
    assert main([*command, "--stages", "encode_256,prefill,decode,second_question"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "openvino+cpu"
    assert [each["engine"] for each in report["contenders"]] == ["openvino+cpu"]
    assert all(row["ours_s"] > 0 for row in report["stages"].values())
    assert report["bounds"]["integer_operations_per_second"] > 1e9


def test_the_tower_is_left_where_it_is_right(exported: Exporter) -> None:
    rounded = opened(exported(DEMO, decoder="int4", vision="w8a8"))
    assert any("w8a8, which OpenVINO computes wrongly" in note for note in rounded.notes)
    one_layer = (("model.mm_projector.0.weight", "int8 channel"),)
    projector = opened(exported(DEMO, decoder="int4", vision="f32", overrides=one_layer))
    assert any("w8a8, which OpenVINO computes wrongly" in note for note in projector.notes)
    floats = exported(DEMO, decoder="f32", vision="f32")
    assert not any("w8a8" in note for note in opened(floats).notes)
    assert onnx_engines.ROUNDED_ROWS in {entry.scheme for entry in rounded.manifest.tensors.values()}
    patches = opened(floats).preprocess(PICTURES[0])
    features = [opened(floats, device)._encoder.engine.encode(patches) for device in ("cpu", "openvino")]
    np.testing.assert_allclose(*features, atol=TOLERANCE)
