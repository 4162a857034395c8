"""GGUF models through the same runtime and command line: directories, bare pairs, text alone, and what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phisight
from phisight.answer import collect
from phisight.cli.main import main
from phisight.conversation import Conversation
from phisight.errors import EngineError, ImageError, InputError, ModelDirError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, plan_gguf
from phisight.export.gguf_plan import GgufOptions

DEMO = Path(phisight.__file__).parent / "demo"
PRICE, CHART = DEMO / "pictures/price.png", DEMO / "pictures/chart.png"
QUESTION = "What does the text say?"

pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The built-in model as a GGUF directory, each kind made once. Read only."""
    made: dict[Any, Path] = {}

    def make(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "model"
            checkpoint = Checkpoint.open(DEMO / "checkpoint")
            export_gguf(checkpoint, plan_gguf(checkpoint, GgufOptions(**options)), made[key])
        return made[key]

    return make


def answer(model: phisight.Model, *images: Path, question: str = QUESTION, **rest: Any) -> phisight.Answer:
    return model.generate(question, images, options=model.options(temperature=0, **rest))


@pytest.mark.parametrize("engine", ["auto", "onnx", "mtmd"])
def test_a_directory(engine: Any, export: Callable[..., Path]) -> None:
    model = phisight.load(export(decoder="Q8_0"), threads=1, vision_engine=engine)
    assert answer(model, PRICE).text == "$6.75"
    assert ("llama.cpp, exact" if engine == "mtmd" else "ONNX Runtime") in model.notes[-1]


@pytest.mark.parametrize("decoder", ["F32", "F16", "Q8_0", "Q6_K", "Q5_K_M"])
def test_answers_are_those_of_the_onnx_model(decoder: str, export: Callable[..., Path]) -> None:
    reference = phisight.load("demo", threads=1)
    model = phisight.load(export(decoder=decoder), threads=1)
    chart = "What is the value of the orange bar?"
    assert answer(model, PRICE).text == answer(reference, PRICE).text == "$6.75"
    assert answer(model, CHART, question=chart).text == answer(reference, CHART, question=chart).text == "3"


def test_a_bare_pair_and_text_alone(export: Callable[..., Path], tmp_path: Path) -> None:
    directory = export(decoder="F16", onnx_vision="none")
    text, mmproj = tmp_path / "any.gguf", tmp_path / "eyes.gguf"
    shutil.copyfile(directory / "model-f16.gguf", text)
    shutil.copyfile(directory / "mmproj-f16.gguf", mmproj)
    pair = phisight.load(text, mmproj=mmproj, threads=1)
    assert answer(pair, PRICE).text == "$6.75"
    assert pair.budget == phisight.load("demo", threads=1).budget
    alone = phisight.load(text, threads=1)
    assert answer(alone, question="What is 3 + 4?").text
    with pytest.raises(ImageError, match="without its mmproj"):
        answer(alone, PRICE)
    ids = phisight.load("demo", threads=1).prompt(QUESTION, 1, mode="think").ids
    assert pair.prompt(QUESTION, 1, mode="think").ids == ids


def test_a_conversation_reuses_the_cache(export: Callable[..., Path]) -> None:
    model = phisight.load(export(decoder="Q8_0"), threads=1, kv_type="q8_0")
    conversation = Conversation(model)
    options = model.options(temperature=0)
    first = collect(conversation.ask(QUESTION, [PRICE], options=options)).stats
    second = collect(conversation.ask(QUESTION, options=options)).stats
    assert second.reused_positions == first.text_tokens + first.image_tokens + first.generated_tokens
    assert second.cached_images == 1


def test_a_seed_gives_the_same_stream_on_both_engines(export: Callable[..., Path]) -> None:
    reference = phisight.load("demo", threads=1, accuracy_level=0)
    model = phisight.load(export(decoder="Q8_0"), threads=1)
    options = model.options(temperature=0.5, top_p=1.0, seed=7)
    assert model.generate(QUESTION, [PRICE], options=options).text == "$6.75"
    assert reference.generate(QUESTION, [PRICE], options=options).text == "$6.75"


def test_what_does_not_fit(export: Callable[..., Path], tmp_path: Path, golden: Path) -> None:
    directory = export(decoder="F16", onnx_vision="none")
    text, mmproj = directory / "model-f16.gguf", directory / "mmproj-f16.gguf"
    other = tmp_path / "tiny"
    checkpoint = Checkpoint.open(golden / "tiny_model")
    export_gguf(checkpoint, plan_gguf(checkpoint, GgufOptions(decoder="F16", onnx_vision="none")), other)
    with pytest.raises(ModelDirError, match="width"):
        phisight.load(text, mmproj=other / "mmproj-f16.gguf")
    with pytest.raises(ModelDirError, match="architecture 'clip'"):
        phisight.load(mmproj)
    with pytest.raises(ModelDirError, match="architecture 'phi3'"):
        phisight.load(text, mmproj=text)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(text.read_bytes()[:-1000])
    with pytest.raises(ModelDirError, match=r"cut\.gguf"):
        phisight.load(cut)
    with pytest.raises(InputError, match=r"no vision\.onnx"):
        phisight.load(directory, vision_engine="onnx")
    with pytest.raises(InputError, match="mmproj goes with a GGUF file"):
        phisight.load(directory, mmproj=mmproj)
    with pytest.raises(InputError, match="accuracy_level is for ONNX"):
        phisight.load(directory, accuracy_level=0)
    for path in (directory, text):
        with pytest.raises(InputError, match=r"device is openvino, but .* is a GGUF model"):
            phisight.load(path, device="openvino")
    with pytest.raises(InputError, match="are for GGUF"):
        phisight.load("demo", gpu_layers=1)
    with pytest.raises(InputError, match="gpu_layers is -1"):
        phisight.load(text, gpu_layers=-1)


def test_without_onnx_runtime_llama_cpp_sees(export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from phisight.backends import ort_session

    def missing() -> None:
        raise EngineError("ONNX Runtime cannot be imported")

    monkeypatch.setattr(ort_session, "import_onnxruntime", missing)
    ort_session.integer_products.cache_clear()
    model = phisight.load(export(decoder="Q8_0"), threads=1)
    assert "llama.cpp, exact" in model.notes[-1]
    with pytest.raises(EngineError, match="ONNX Runtime"):
        phisight.load(export(decoder="Q8_0"), threads=1, vision_engine="onnx")


def test_the_commands(export: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = export(decoder="F16", onnx_vision="none")
    text, mmproj = str(directory / "model-f16.gguf"), str(directory / "mmproj-f16.gguf")
    run = ["run", text, QUESTION, "--image", str(PRICE), "--mmproj", mmproj, "--threads", "1", "--temperature", "0"]
    assert main([*run, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"] == "$6.75"
    assert captured.err == ""  # llama.cpp's log is silent
    assert main(["run", text, QUESTION, "--image", str(PRICE)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batch_on_bare_files(export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = export(decoder="F16", onnx_vision="none")
    cases, out = tmp_path / "cases.jsonl", tmp_path / "answers.jsonl"
    cases.write_text(json.dumps({"prompt": QUESTION, "image": str(PRICE)}) + "\n")
    batch = ["batch", str(directory / "model-f16.gguf"), str(cases), "--out", str(out), "--temperature", "0"]
    pair = ["--mmproj", str(directory / "mmproj-f16.gguf"), "--threads", "1"]
    assert main([*batch, *pair]) == 0
    assert json.loads(out.read_text())["text"] == "$6.75"
    capsys.readouterr()
    assert main([*batch, *pair, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1


# A file begins: magic 0, version 4, number of tensors 8, number of keys 16, length of the first key 24, the key
# (general.architecture) 32, its type 52, the length of its text 56, the text (phi3) 64.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the first key": lambda data: data[:40],
    "cut in the tokenizer": lambda data: data[:9000],
    "cut in the tensor table": lambda data: data[: data.index(b"blk.0.attn_norm.weight") + 30],
    "cut in the weights": lambda data: data[: len(data) * 2 // 3],
    "wrong magic": lambda data: b"GGML" + data[4:],
    "a version to come": lambda data: data[:4] + b"\x09\0\0\0" + data[8:],
    "huge number of tensors": lambda data: data[:8] + b"\xff" * 7 + b"\x7f" + data[16:],
    "huge number of keys": lambda data: data[:16] + b"\xff" * 7 + b"\x7f" + data[24:],
    "huge text": lambda data: data[:56] + b"\xff" * 7 + b"\x7f" + data[64:],
    "a text that is not UTF-8": lambda data: data[:64] + b"\xff\xfe\xfd\xfc" + data[68:],
    "a key of no type": lambda data: data[:52] + b"\x63\0\0\0" + data[56:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_never_reaches_llama_cpp(name: str, export: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(DAMAGES[name]((export(decoder="F16", onnx_vision="none") / "model-f16.gguf").read_bytes()))
    command = [sys.executable, "-m", "phisight.cli.main", "run", str(damaged), "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("phisight: error: ")
    assert done.stderr.count("\n") == 1
    assert "damaged.gguf" in done.stderr
