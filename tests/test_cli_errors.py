"""What a user gets wrong is one line on standard error, an exit code, and nothing on standard output."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import phisight
from phisight.backends import ort
from phisight.cli import run as run_command
from phisight.cli.main import COMMANDS, main
from phisight.errors import Cancelled, EngineError

DEMO = Path(phisight.__file__).parent / "demo"
PRICE = DEMO / "pictures/price.png"

Captured = pytest.CaptureFixture[str]


def error(capsys: Captured, *arguments: str | Path, code: int = 2) -> str:
    """The one line of a command that fails, without its beginning."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("phisight: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("phisight: error: ").rstrip("\n")


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """The built-in model, to be changed."""
    return Path(shutil.copytree(DEMO / "onnx", tmp_path / "model"))


# models


def test_a_model_that_is_not_there(capsys: Captured, tmp_path: Path) -> None:
    said = error(capsys, "run", tmp_path / "none", "Hello")
    assert said == f"{tmp_path / 'none'} is not there: give an exported model directory, or demo"


def test_what_is_no_model(capsys: Captured, tmp_path: Path) -> None:
    for command in (["run"], ["chat"]):
        rest = ["Hello"] if command == ["run"] else []
        assert "it is a checkpoint: export it first" in error(capsys, *command, DEMO / "checkpoint", *rest)
        assert "has no phisight.json, it is not a model" in error(capsys, *command, tmp_path, *rest)
        assert f"{PRICE} does not begin with GGUF" in error(capsys, *command, PRICE, *rest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ('{"schema": 1', "cannot be read as JSON"),
        ("[]", "is not a manifest of schema 1"),
        ('{"schema": 1}', "is not a manifest of schema 1"),
        ('{"schema": 99}', "has schema 99, this version of phisight reads up to 1: update phisight"),
    ],
)
def test_a_damaged_manifest(capsys: Captured, model_copy: Path, text: str, said: str) -> None:
    manifest = model_copy / "phisight.json"
    manifest.write_text(text)
    line = error(capsys, "run", model_copy, "Hello")
    assert line.startswith(f"{manifest} ")
    assert said in line


def test_files_that_were_not_copied_whole(capsys: Captured, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    weights = model_copy / "decoder.onnx.data"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size // 2)
    said = error(capsys, "run", model_copy, "Hello")
    assert f"decoder.onnx.data has {size // 2} bytes, wanted {size}" in said
    assert "tokenizer.json is missing" in said


def test_a_graph_that_the_engine_cannot_open(capsys: Captured, model_copy: Path) -> None:
    graph = model_copy / "decoder.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)  # its size is right
    said = error(capsys, "run", model_copy, "Hello", code=1)
    assert "decoder.onnx" in said
    assert "unexpected" not in said


# images


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"A text, not a picture.\n", "is not an image that can be read"),
        (PRICE.read_bytes()[:600], "truncated"),
        (b"\x89PNG\r\n\x1a\n", "image.png"),
    ],
)
def test_an_image_that_cannot_be_read(capsys: Captured, tmp_path: Path, data: bytes | None, said: str) -> None:
    picture = tmp_path / "image.png"
    if data is not None:
        picture.write_bytes(data)
    # The good picture before it does not make up for it.
    line = error(capsys, "run", "demo", "What?", "--image", PRICE, "--image", picture)
    assert str(picture) in line
    assert said in line


def test_an_image_that_is_a_directory(capsys: Captured, tmp_path: Path) -> None:
    assert "is a directory" in error(capsys, "run", "demo", "What?", "--image", tmp_path)


def test_a_decompression_bomb(capsys: Captured, tmp_path: Path) -> None:
    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)  # 10 gigapixels: 30 GB decoded
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", b"") + block(b"IEND", b""))
    said = error(capsys, "run", "demo", "What?", "--image", bomb)
    assert str(bomb) in said
    assert "100000 x 100000" in said


def test_an_image_for_a_text_only_model(capsys: Captured, model_copy: Path) -> None:
    path = model_copy / "phisight.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["model"] |= {"vision": None, "images": None}
    for name in [name for name in manifest["files"] if name.startswith("vision")]:
        (model_copy / name).unlink()
        del manifest["files"][name]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    said = error(capsys, "run", model_copy, "What?", "--image", PRICE)
    assert "text-only" in said
    assert main(["run", str(model_copy), "Hello", "--max-tokens", "1"]) == 0  # it does answer


# lengths and options


def test_a_context_too_small(capsys: Captured) -> None:
    said = error(capsys, "run", "demo", "What does the text say?", "--image", PRICE, "--context", "48")
    assert "takes 48 positions (16 text and 32 image tokens)" in said
    assert "the context holds 48" in said
    assert "context is 2000 positions, wanted 2 to the model's 1024" in error(
        capsys, "run", "demo", "Hello", "--context", "2000"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-tokens", "0"], "max_tokens is 0: give a whole number, 1 or more"),
        (["--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (["--temperature", "nan"], "temperature is nan: give a number, 0 or more"),
        (["--temperature", "-1"], "temperature is -1.0: give a number, 0 or more"),
        (["--temperature", "inf"], "temperature is inf: give a number"),
        (["--top-p", "0"], "top_p is 0.0: give a number, above 0 and at most 1"),
        (["--top-k", "0"], "top_k is 0: give a whole number, 1 or more"),
        (["--min-p", "2"], "min_p is 2.0: give a number, 0 to 1"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0: give a number, above 0"),
        (["--seed", "-1"], "seed is -1: give a whole number, 0 or more"),
        (["--stop", ""], "stop is ('',): give a tuple of texts that are not empty"),
        (["--thinking-budget", "-1"], "thinking_budget is -1: give a whole number, 0 or more"),
        (["--threads", "0"], "threads is 0: give a whole number, 1 or more"),
        (["--threads", "two"], "--threads is 'two', wanted a whole number or auto"),
        (["--context", "1"], "context is 1 positions, wanted 2 to the model's 1024"),
        (["--max-patches", "145", "--image", str(PRICE)], "max_patches is 145, wanted 1 to 144"),
        (["--max-patches", "0", "--image", str(PRICE)], "max_patches is 0, wanted 1 to 144"),
        (["--mode", "fast"], "argument --mode: invalid choice: 'fast'"),
        (["--device", "tpu"], "device is 'tpu', wanted auto"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--frob\nnicate"], "unrecognized arguments: --frob nicate"),
        (["--image"], "argument --image: expected one argument"),
    ],
)
def test_options(capsys: Captured, arguments: list[str], said: str) -> None:
    assert error(capsys, "run", "demo", "Hello", *arguments).startswith(said)


def test_cuda_without_cuda(capsys: Captured) -> None:
    # Without the package, or with it: the built-in model computes in float32.
    assert error(capsys, "run", "demo", "Hello", "--device", "cuda").startswith("device cuda needs ")


def test_commands(capsys: Captured) -> None:
    said = error(capsys, "runs")
    assert "invalid choice: 'runs'" in said
    assert all(name in said for name in COMMANDS)
    assert "COMMAND" in error(capsys)
    for name in COMMANDS.keys() - {"demo", "cache", "plan"}:  # which need no argument
        assert f"(see phisight {name} --help)" in error(capsys, name)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_a_result(capsys: Captured, command: list[str]) -> None:
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {' '.join(['phisight', *command])} ")
    assert "examples:" in out
    assert err == ""


def test_the_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"phisight {version('phisight')}\n", "")


# what is not the user's doing


def test_a_missing_engine(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it raises
    said = error(capsys, "run", "demo", "Hello", code=1)
    assert said.startswith("ONNX Runtime cannot be imported")
    assert 'pip install "phisight[cpu]"' in said


def failing(kind: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise kind

    return fail


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (EngineError("the engine failed"), "the engine failed"),
        (Cancelled("the caller stopped it"), "the caller stopped it"),
        (ZeroDivisionError("division\nby zero"), "unexpected ZeroDivisionError: division by zero"),
        (OSError(28, "No space left"), "unexpected OSError: [Errno 28] No space left"),
        (MemoryError(), "unexpected MemoryError"),
    ],
)
def test_a_failure_is_exit_code_1(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, kind: Exception, said: str
) -> None:
    monkeypatch.setattr(run_command, "load_model", failing(kind))
    assert error(capsys, "run", "demo", "Hello", code=1) == said


def test_a_failure_within_an_answer_comes_on_a_line_of_its_own(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, runs = ort.OrtDecoder.append, 0

    def failing_append(self: ort.OrtDecoder, *arguments: object, causal: bool = True) -> object:
        nonlocal runs
        runs += 1
        if runs == 4:  # the prompt and three tokens
            raise EngineError("the engine failed")
        return append(self, *arguments, causal=causal)  # type: ignore[arg-type]

    monkeypatch.setattr(ort.OrtDecoder, "append", failing_append)
    asked = ["run", "demo", "What does the text say?", "--image", str(PRICE)]
    assert main([*asked, "--mode", "nothink"]) == 1
    assert capsys.readouterr() == ("$6.\n", "phisight: error: the engine failed\n")
    runs = 0
    assert main([*asked, "--mode", "think"]) == 1
    assert capsys.readouterr() == ("", "$ 6\nphisight: error: the engine failed\n")
    runs = 0
    assert main([*asked, "--json"]) == 1
    assert capsys.readouterr() == ("", "phisight: error: the engine failed\n")


def test_debug_adds_a_traceback(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "none"
    assert main(["run", str(missing), "Hello", "--debug"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1].startswith(f"phisight: error: {missing} is not there")
    monkeypatch.setattr(run_command, "load_model", failing(ZeroDivisionError("division by zero")))
    assert main(["run", "demo", "Hello", "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "phisight: error: unexpected ZeroDivisionError: division by zero"


def test_the_program_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "phisight.cli.main", "run", "demo", "Hello", "--max-tokens", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "phisight: error: max_tokens is 0: give a whole number, 1 or more, or None\n"
