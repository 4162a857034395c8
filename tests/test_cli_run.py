"""`phisight run` on the built-in model: what goes to which stream, and every option."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phisight
from phisight.answer import Chunk
from phisight.cli import run
from phisight.cli.console import Console
from phisight.cli.main import main
from phisight.prompt import Message, user_message

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
PRICE = ("What does the text say?", "--image", str(PICTURES / "price.png"))
BAR = ("What is the value of the orange bar?", "--image", str(PICTURES / "chart.png"))
COMMAND = [sys.executable, "-m", "phisight.cli.main", "run", "demo"]

Captured = pytest.CaptureFixture[str]


def answer(capsys: Captured, *arguments: str) -> tuple[str, str]:
    """Both streams of a run that succeeds."""
    assert main(["run", "demo", *arguments]) == 0
    out, err = capsys.readouterr()
    return out, err


def document(capsys: Captured, *arguments: str) -> dict[str, object]:
    """The one JSON document on standard output."""
    out, err = answer(capsys, *arguments, "--json")
    assert "$" not in err  # neither thought nor answer
    parsed: dict[str, object] = json.loads(out)
    return parsed


def stats(capsys: Captured, *arguments: str) -> dict[str, object]:
    found = document(capsys, *arguments)["stats"]
    assert isinstance(found, dict)
    return found


def test_the_answer_alone_is_on_standard_output(capsys: Captured) -> None:
    assert answer(capsys, *PRICE) == ("$6.75\n", "")
    assert answer(capsys, *BAR) == ("3\n", "")
    assert answer(capsys, *PRICE, "--mode", "nothink") == ("$6.75\n", "")


def test_the_thought_is_on_standard_error(capsys: Captured) -> None:
    assert answer(capsys, *PRICE, "--mode", "think") == ("$6.75\n", "$ 6 . 7 5\n")


def test_a_thought_without_an_answer_is_said(capsys: Captured) -> None:
    out, err = answer(capsys, *PRICE, "--mode", "think", "--max-tokens", "3")
    assert out == "\n"
    thought, note = err.splitlines()
    assert thought == "$ 6"
    assert "without an answer" in note
    out, err = answer(capsys, *PRICE, "--mode", "nothink", "--max-tokens", "3")
    assert out == "$6.\n"
    assert "before its end" in err
    assert answer(capsys, *PRICE, "--mode", "nothink", "--thinking-budget", "0") == ("$6.75\n", "")
    assert answer(capsys, *PRICE, "--mode", "think", "--thinking-budget", "3") == ("$6.75\n", "$ 6\n")


def test_json_is_one_document(capsys: Captured) -> None:
    out, err = answer(capsys, *PRICE, "--mode", "think", "--json", "--system", "Be exact.")
    assert (out[0], out[-2:]) == ("{", "}\n")
    found = json.loads(out)
    assert sorted(found) == ["finish_reason", "model", "notes", "stats", "text", "thought"]
    assert (found["text"], found["thought"], found["finish_reason"]) == ("$6.75", "$ 6 . 7 5", "stop")
    assert found["model"] == "demo"
    assert found["stats"]["image_tokens"] == 32
    assert [note for note in found["notes"] if "system message" in note]
    assert "6.75" not in err


def test_stats_are_for_people(capsys: Captured) -> None:
    out, err = answer(capsys, *PRICE, "--stats", "--seed", "7", "--threads", "1", "--device", "cpu")
    assert out == "$6.75\n"
    lines = err.splitlines()
    assert lines[0] == "phisight: note: device cpu: as asked for"
    assert lines[1].startswith("phisight: note: 1 threads: as asked for")
    images, prompt, answered = lines[-3:]
    assert images.startswith("images:  1: ")
    assert prompt.startswith("prompt:  16 text and 32 image tokens: ")
    assert re.fullmatch(r"answer:  6 tokens, 0 of them thought: .*, seed 7", answered)


def test_a_system_message_is_placed_and_said(capsys: Captured) -> None:
    plain = stats(capsys, *PRICE)["text_tokens"]
    out, err = answer(capsys, *PRICE, "--system", "Be exact.")
    assert out == "$6.75\n"
    assert err.startswith("phisight: note: The chat template has no place for the system message")
    assert err.count("\n") == 1
    assert stats(capsys, *PRICE, "--system", "Be exact.")["text_tokens"] > plain  # type: ignore[operator]
    out, err = answer(capsys, *PRICE, "--system", "none")
    assert out == "$6.75\n"
    assert err == "phisight: note: The chat template adds no system block of its own: there is none to leave out.\n"


def test_the_question_from_standard_input(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noting(text: str, num_images: int) -> Message:
        asked.append(text)
        return user_message(text, num_images)

    monkeypatch.setattr(run, "user_message", noting)
    for given in (PRICE[0], PRICE[0] + "\n", "two\nlines\n\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        answer(capsys, "-", *PRICE[1:])
    assert asked == [PRICE[0], PRICE[0], "two\nlines\n"]  # the last line end is the file's


def test_standard_input_that_is_no_text(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe?"), encoding="utf-8"))
    assert main(["run", "demo", "-"]) == 2
    assert capsys.readouterr().err.startswith("phisight: error: standard input is not utf-8")


def test_several_images_in_their_order(capsys: Captured) -> None:
    found = stats(capsys, *PRICE, *BAR[1:])
    assert (found["images"], found["image_tokens"], found["text_tokens"]) == (2, 32 + 48, 17)
    twice = stats(capsys, *PRICE, *PRICE[1:])
    assert (twice["images"], twice["image_tokens"]) == (2, 64)
    assert stats(capsys, "Hello")["images"] == 0


def test_most_patches(capsys: Captured) -> None:
    buttons = ("Which?", "--image", str(PICTURES / "buttons.png"))
    assert stats(capsys, *buttons)["image_tokens"] == 64
    assert stats(capsys, *buttons, "--max-patches", "16")["image_tokens"] == 16


def test_a_seed_repeats_the_answer(capsys: Captured) -> None:
    sampled = (*PRICE, "--temperature", "3", "--top-p", "1", "--max-tokens", "20", "--seed")
    answers = [answer(capsys, *sampled, seed)[0] for seed in ("0", "1", "2", "1")]
    assert answers[1] == answers[3]
    assert len(set(answers)) == 3


def test_narrow_sampling_is_greedy(capsys: Captured) -> None:
    for narrow in (["--top-k", "1"], ["--min-p", "1"], ["--top-p", "1e-9"], ["--temperature", "0"]):
        assert answer(capsys, *PRICE, "--temperature", "3", *narrow)[0] == "$6.75\n"


def test_the_engines_options(capsys: Captured) -> None:
    assert answer(capsys, *PRICE, "--accuracy-level", "0", "--threads", "2")[0] == "$6.75\n"
    out, err = answer(capsys, *PRICE, "--mode", "nothink", "--context", "51")  # the prompt's 49 and 2 tokens
    assert out == "$6\n"
    assert "before its end" in err


def test_repetition_is_penalised(capsys: Captured) -> None:
    price = (*PRICE, "--mode", "think", "--max-tokens", "6")
    assert answer(capsys, *price)[1].startswith("$ 6 . 7")
    _, thought = answer(capsys, *price, "--repetition-penalty", "1000")
    assert thought.startswith("$ 6 .")
    assert not thought.startswith("$ 6 . 7")  # the space before it is a token, which does not come twice


def test_stop_texts(capsys: Captured) -> None:
    assert answer(capsys, *PRICE, "--stop", "75") == ("$6.\n", "")
    assert answer(capsys, *PRICE, "--stop", "none of it", "--stop", "6.") == ("$\n", "")
    assert document(capsys, *PRICE, "--stop", ".")["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("mode", "shown", "out", "err"),
    [("nothink", 2, "$6\n", "phisight: interrupted\n"), ("think", 3, "", "$ 6\nphisight: interrupted\n")],
)
def test_an_interrupted_answer_keeps_its_line(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, mode: str, shown: int, out: str, err: str
) -> None:
    show, count = run.show, 0

    def interrupted_show(chunk: Chunk, before: Chunk, console: Console) -> None:
        nonlocal count
        show(chunk, before, console)
        count += 1
        if count == shown:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "show", interrupted_show)
    assert main(["run", "demo", *PRICE, "--mode", mode]) == 130
    assert capsys.readouterr() == (out, err)


def test_an_interrupt_before_the_answer(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_load(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "load_model", interrupted_load)
    assert main(["run", "demo", *PRICE]) == 130
    assert capsys.readouterr() == ("", "phisight: interrupted\n")


class CodePage(io.TextIOWrapper):
    """A stream of a Windows terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252", errors="strict", newline="\n")

    def text(self) -> str:
        return self.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined, no-any-return]


def test_an_answer_outside_the_terminals_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = CodePage(), CodePage()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def foreign_show(chunk: Chunk, before: Chunk, console: Console) -> None:
        console.write("é日€" if chunk.finish_reason is None else "")
        console.aside("字")

    monkeypatch.setattr(run, "show", foreign_show)
    assert main(["run", "demo", *PRICE, "--max-tokens", "1", "--mode", "nothink"]) == 0
    assert out.text() == "é?€\n"
    assert err.text().startswith("??")


def test_an_error_outside_the_terminals_encoding(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    missing = tmp_path / "日本.png"
    done = subprocess.run(
        [*COMMAND, "What?", "--image", str(missing)], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stdout == b""
    error = done.stderr.decode("cp1252")
    assert error.startswith("phisight: error: ")
    assert "??.png does not exist" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_left_quietly(unbuffered: str) -> None:
    running = subprocess.Popen(
        [*COMMAND, *PRICE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()  # long before the answer: the interpreter is still starting
    error = running.stderr.read()
    running.stderr.close()
    assert (running.wait(), error) == (1, b"")


class BrokenStream(io.TextIOWrapper):
    """Standard output that fails as the system lets it fail."""

    def __init__(self, code: int, path: Path) -> None:
        super().__init__(path.open("wb"), encoding="utf-8")
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EPIPE, ""),
        (errno.EINVAL, ""),  # a closed pipe on Windows
        (errno.ENOSPC, f"phisight: error: the stream cannot be written: {os.strerror(errno.ENOSPC)}\n"),
    ],
)
def test_standard_output_fails(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, said: str
) -> None:
    for arguments in (PRICE, (*PRICE, "--json"), (*PRICE, "--mode", "think", "--max-tokens", "3")):
        stream = BrokenStream(code, tmp_path / "out")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["run", "demo", *arguments]) == 1
        err = capsys.readouterr().err
        assert err.replace(stream.name, "the stream").removeprefix("$ 6\n") == said
        assert (tmp_path / "out").read_bytes() == b""
