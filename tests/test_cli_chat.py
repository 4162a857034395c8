"""The conversation in the terminal, on the built-in model."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phisight
from phisight.answer import Chunk
from phisight.cli import chat
from phisight.cli.console import Console
from phisight.cli.main import main

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
PRICE = "What does the text say?"


def talk(lines: list[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", "demo", "--temperature", "0", *arguments]) == 0


def test_pictures_questions_and_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spaced = tmp_path / "a price.png"
    spaced.write_bytes((PICTURES / "price.png").read_bytes())
    lines = [
        f"/image {spaced}",
        PRICE,
        "/stats",
        PRICE,
        "/reset",
        f'/image "{spaced}" {PICTURES / "chart.png"}',
        "/quit",
        "?",
    ]
    talk(lines, monkeypatch)
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "$6.75"
    assert len(out.splitlines()) == 2  # nothing is answered after /quit
    assert "32 image tokens" in err
    assert "pictures for the next question: 2" in err


def test_an_error_ends_the_turn_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    lines = ["/image none.png", "/mode fast", "/nonsense", "/image", f"/image {broken}", PRICE]
    talk([*lines, "/reset", f"/image {PICTURES / 'price.png'}", PRICE], monkeypatch)
    out, err = capsys.readouterr()
    assert out == "$6.75\n"
    errors = [line for line in err.splitlines() if line.startswith("phisight: error: ")]
    assert len(errors) == 5
    for line, word in zip(errors, ["none.png", "fast", "/nonsense", "/image", "broken.png"], strict=True):
        assert word in line


def test_an_interrupt_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Chunk] = []

    def interrupting_show(chunk: Chunk, before: Chunk, console: Console) -> None:
        shown.append(chunk)
        if len(shown) == 1:
            signal.raise_signal(signal.SIGINT)
        show(chunk, before, console)

    show = chat.show
    monkeypatch.setattr(chat, "show", interrupting_show)
    image = f"/image {PICTURES / 'price.png'}"
    talk([image, PRICE, "/reset", image, PRICE], monkeypatch, "--mode", "think")
    out, _ = capsys.readouterr()
    assert shown[1].finish_reason == "cancelled"
    assert out.splitlines() == [" [stopped]", "$6.75"]
    with pytest.raises(KeyboardInterrupt):  # the usual handling is back
        signal.raise_signal(signal.SIGINT)


def test_the_end_of_the_input_leaves_quietly() -> None:
    command = [sys.executable, "-m", "phisight.cli.main", "chat", "demo"]
    done = subprocess.run(command, input="/help\n", capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "/image FILE" in done.stderr
    assert "> " not in done.stderr
