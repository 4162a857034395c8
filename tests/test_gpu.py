"""CUDA and WebGPU on a real GPU, beside the CPU and the reference's numbers. Each test skips where there is none.

A software adapter does not count: `tests/test_webgpu.py` has what such a one can compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.backends.ort import OrtDecoder
from phisight.backends.ort_session import import_onnxruntime
from phisight.backends.ort_webgpu import PROVIDER, add_webgpu, webgpu_installed
from phisight.cli.main import main
from phisight.errors import EngineError
from phisight.loading import checkpoint_directory
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.tasks import TASKS, sample

Exporter = Callable[..., Path]

DEMO = checkpoint_directory("demo")
PICTURES = sorted((Path(phisight.__file__).parent / "demo/pictures").glob("*.png"))
QUESTION = "What does the text say?"
HALF: dict[str, Any] = {"float_type": "f16", "vision": "f16"}
FULL: dict[str, Any] = {"float_type": "f32", "vision": "f32"}
WAYS = {"cuda": ("cuda", HALF), "webgpu, float16": ("webgpu", HALF), "webgpu, float32": ("webgpu", FULL)}
"""A device and the options of an export that runs there."""
ERRORS = {"f16": 0.01, "f32": 1e-4}
"""Most that a GPU's logits may differ from the reference's, as a share of the largest, by the type of the graphs."""
PER_TASK = 10
MOST_OTHER_ANSWERS = {"f16": 0.1, "f32": 0.02}


@cache
def missing(device: str) -> str | None:
    """Why there is no such GPU here."""
    ort = import_onnxruntime()
    if device == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            return "this onnxruntime has no CUDA: onnxruntime-gpu takes its place where a card of NVIDIA's is"
        return None
    if PROVIDER in ort.get_available_providers():
        return "the provider that is built in may be a software adapter: tests/test_webgpu.py tries that"
    if not webgpu_installed(ort):
        return "onnxruntime-ep-webgpu is not installed"
    try:
        add_webgpu(ort, ort.SessionOptions())
    except EngineError as error:
        return str(error)
    return None


@pytest.fixture(params=WAYS, scope="module")
def way(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    device, options = WAYS[request.param]
    if (reason := missing(device)) is not None:
        pytest.skip(f"no {device} here: {reason}")
    return device, options


@pytest.fixture(scope="module")
def pair(way: tuple[str, dict[str, Any]], exported: Exporter) -> tuple[Model, Model]:
    """The built-in model in INT4 on the CPU in float32, and on the GPU."""
    device, options = way
    exact = exported(DEMO, decoder="int4", **FULL, accuracy_level=0)
    on_gpu = exported(DEMO, decoder="int4", **options, accuracy_level=0)
    return phisight.load(exact, device="cpu", threads=2), phisight.load(on_gpu, device=device, threads=2)


def engine(model: Model) -> OrtDecoder:
    decoder = model._decoder._decoder
    assert isinstance(decoder, OrtDecoder)
    return decoder.fork()


def difference(found: NDArray[Any], right: NDArray[Any]) -> float:
    assert found.shape == right.shape and np.isfinite(found).all()
    return float(np.abs(found.astype(np.float64) - right).max() / np.abs(right).max())


def test_the_references_numbers(
    way: tuple[str, dict[str, Any]],
    golden: Path,
    tiny_checkpoint: Path,
    exported: Exporter,
    synthetic_image: Callable[..., Any],
) -> None:
    """Features, logits, and every token of the reference's that is likelier than others by more than the error."""
    device, options = way
    kind = options["float_type"]
    model = phisight.load(exported(tiny_checkpoint, decoder=kind, **options), device=device, threads=2)
    told = 0
    for case in json.loads((golden / "tiny_golden/cases.json").read_text()):
        with np.load(golden / f"tiny_golden/{case['name']}.npz") as file:
            arrays = dict(file)
        limits = (64, 4) if case["processor"] == "micro" else (3600, 256)
        images = []
        for j, source in enumerate(case["images"]):
            picture = next((golden / "images").glob("*.png")) if source == "png" else synthetic_image(*source)
            images.append(phisight.preprocess(picture, *limits))
            features, wanted = model.encode_image(images[-1]), arrays[f"img{j}/projected"]
            assert difference(features if len(features) <= 300 else features[::16], wanted) < ERRORS[kind]
        greedy = case["greedy_tokens_no_cache_no_eos"]
        logits = model.score([*arrays["input_ids"].tolist(), *greedy[:-1]], images)
        length = len(logits) - len(greedy) + 1
        assert difference(logits[:4], arrays["logits_first4"]) < ERRORS[kind]
        assert difference(logits[length - 8 : length], arrays["logits_last8"]) < ERRORS[kind]
        clear = arrays["greedy_margins"] > 2 * ERRORS[kind] * np.abs(arrays["logits_last8"]).max()
        told += int(clear.sum())
        np.testing.assert_array_equal(logits[length - 1 :].argmax(-1)[clear], np.array(greedy)[clear])
    assert told > 100  # of 168


def test_answers_to_drawn_questions(pair: tuple[Model, Model], way: tuple[str, dict[str, Any]]) -> None:
    other = []
    for task in TASKS:
        for seed in range(PER_TASK):
            asked = sample(task, seed)
            right, found = (
                model.generate(
                    asked.question.text,
                    list(asked.pictures),
                    mode="think" if asked.question.thinks else "nothink",
                    options=model.options(temperature=0, max_tokens=40),
                )
                for model in pair
            )
            if (found.thought, found.text) != (right.thought, right.text):
                other.append((task, seed, right.text, found.text))
    assert len(other) <= MOST_OTHER_ANSWERS[way[1]["float_type"]] * PER_TASK * len(TASKS), other


def test_a_cache_that_grows_and_is_cut_and_kept(pair: tuple[Model, Model], way: tuple[str, dict[str, Any]]) -> None:
    """Token ids and image features, in chunks and one by one."""
    cpu, gpu = map(engine, pair)
    most = ERRORS[way[1]["float_type"]]
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.5, (90, cpu.hidden_size)).astype(np.float32)
    for length, piece in ((0, np.arange(300, dtype=np.int32)), (230, features), (317, np.arange(70, dtype=np.int32))):
        for decoder in (cpu, gpu):
            decoder.truncate(length)
        gpu.reserve(gpu.length + len(piece) + 3)
        assert difference(gpu.append([piece], "all"), cpu.append([piece], "all").copy()) < most
        for id_ in range(3):
            one = [np.array([40 + id_], np.int32)]
            assert difference(gpu.append(one), cpu.append(one).copy()) < most
    assert all(value.device_name() != "cpu" for pair in gpu._cache for value in pair)
    twin = gpu.fork()
    twin.state_load(gpu.state_save())
    one = [np.array([7], np.int32)]
    np.testing.assert_array_equal(twin.append(one).copy(), gpu.append(one))


def test_prompt_lookup_and_chunks_change_nothing(pair: tuple[Model, Model]) -> None:
    model = pair[1]
    ids = model.prompt(QUESTION, 1).ids
    patches = [model.preprocess(PICTURES[0])]
    whole = model.score(ids, patches)
    assert difference(model.score(ids, patches, chunk=17), whole) < ERRORS["f16"]
    copy = [*range(100, 140)] * 3
    plain, guessed = (
        [token.token_id for token in model.generate_tokens(copy, options=GenerateOptions(**options))]
        for options in (
            {"temperature": 0, "max_tokens": 24},
            {"temperature": 0, "max_tokens": 24, "prompt_lookup": True},
        )
    )
    assert plain == guessed


def test_an_image_as_one_chunk(way: tuple[str, dict[str, Any]], exported: Exporter) -> None:
    device, options = way
    right, found = (
        phisight.load(
            exported(DEMO, decoder="int4", **chosen, accuracy_level=0, image_attention="bidirectional"),
            device=where,
            threads=2,
            image_attention="bidirectional",
        )
        for where, chosen in (("cpu", FULL), (device, options))
    )
    patches, ids = [right.preprocess(PICTURES[0])], right.prompt(QUESTION, 1).ids
    error = difference(found.score(ids, patches), right.score(ids, patches))
    assert error < ERRORS[options["float_type"]]


def test_bench_and_run(way: tuple[str, dict[str, Any]], exported: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    device, options = way
    directory = str(exported(DEMO, decoder="int4", **options, accuracy_level=0))
    assert main(["bench", directory, "--device", device, "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == report["contenders"][0]["device"] == device
    assert report["bounds"]["float16_operations_per_second"] > 1e9
    assert report["stages"]["decode"]["ours_s"] > report["stages"]["decode"]["bound_s"] > 0
    assert 0 < report["stages"]["second_question"]["share_of_first"] < 1
    assert main(["run", directory, QUESTION, "--image", str(PICTURES[0]), "--device", device, "--no-cache"]) == 0
    assert capsys.readouterr().out.strip()
