"""`phisight demo` on the built-in model: what it shows, saves and refuses, not whether the model is right."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phisight.answer import Answer, Chunk, Stats
from phisight.cli import demo
from phisight.cli.album import OUTLINE, Album, with_box
from phisight.cli.exhibits import Exhibit, judge
from phisight.cli.main import COMMANDS, main
from phisight.cli.transcript import Transcript
from phisight.errors import InputError
from phisight.tasks import TASKS, sample

COMMAND = [sys.executable, "-m", "phisight.cli.main", "demo"]
FILES = {
    f"{name}.png" for name in ("read", "chart", "ground", "ground-answer", "count", "two_images-1", "two_images-2")
}
QUESTION_KEYS = {"task", "kind", "pictures", "question", "expected", "text", "thought", "right", "box", "overlap"}
QUESTION_KEYS |= {"marked", "finish_reason", "first_token_seconds", "tokens_per_second", "stats"}
POSIX_SHELL = pytest.mark.skipif(sys.platform == "win32", reason="commands are quoted for another shell")

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def document(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["demo", "--json", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    parsed: dict[str, Any] = json.loads(out)
    return parsed


# what it says


def test_six_questions_and_what_to_type_next(capsys: Captured, here: Path) -> None:
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    headings = re.findall(r"^(\w+) \((\d) of 6\)", out, re.MULTILINE)
    assert headings == [(task, str(number)) for number, task in enumerate(TASKS, 1)]
    assert re.findall(r"^question  (.*)", out, re.MULTILINE) == [sample(task, 15).question.text for task in TASKS]
    assert len(re.findall(r"^answer    .+", out, re.MULTILINE)) == 6
    verdicts = re.findall(r"^ {10}(right|wrong: it is .+)", out, re.MULTILINE)
    assert len(verdicts) == 6
    assert len(re.findall(r"first token after \d+\.\d\d s; \d+ tokens", out)) == 6
    assert f"{verdicts.count('right')} of 6 right, " in out
    assert "\x1b" not in out  # this is no terminal
    assert "▀" not in out


@POSIX_SHELL
def test_the_next_commands_are_commands(capsys: Captured, here: Path) -> None:
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.partition("what to type next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert {"run", "chat", "eval", "export", "demo"} == {words[1] for words in commands}
    assert {words[1] for words in commands} <= COMMANDS.keys()
    run = next(words for words in commands if words[1] == "run")
    assert main(run[1:]) == 0
    export = next(words for words in commands if words[1] == "export")
    assert main([*export[1:], "--dry-run"]) == 0
    assert ["phisight", "demo", "--seed", "16"] in commands


@POSIX_SHELL
def test_commands_about_another_model(capsys: Captured, here: Path) -> None:
    assert main(["export", "demo", "a model", "--decoder", "f32", "--json"]) == 0
    capsys.readouterr()
    assert main(["demo", "--model", "a model", "--seed", "4", "--out", "my pictures"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  phisight ")]
    assert [words[1] for words in commands] == ["run", "chat", "eval", "demo"]
    assert all("a model" in words for words in commands)
    assert str(Path("my pictures/read.png")) in commands[0]
    assert commands[-1][-2:] == ["--seed", "5"]


def test_json_is_one_document(capsys: Captured, here: Path) -> None:
    found = document(capsys, "--seed", "3", "--out", "pictures")
    assert sorted(found) == ["model", "out", "questions", "right", "seconds", "seed"]
    assert (found["model"], found["out"], found["seed"]) == ("demo", "pictures", 3)
    questions = found["questions"]
    assert found["right"] == sum(each["right"] for each in questions)
    assert [each["task"] for each in questions] == list(TASKS)
    for each in questions:
        assert each.keys() == QUESTION_KEYS
        wanted = sample(each["task"], 3)
        assert (each["question"], each["expected"]) == (wanted.question.text, wanted.question.answer)
        assert len(each["pictures"]) == len(wanted.pictures) == each["stats"]["images"]
        assert each["finish_reason"] in ("stop", "length")
        assert each["first_token_seconds"] > 0
        assert (each["box"] is None) == (each["marked"] is None)
        assert each["task"] == "ground" or each["box"] is None
        assert (each["overlap"] is None) == (each["task"] != "ground")


def test_the_same_seed_gives_the_same_pictures_and_answers(capsys: Captured, here: Path) -> None:
    def answers(*arguments: str) -> list[str]:
        return [each["text"] for each in document(capsys, *arguments)["questions"]]

    first = answers("--out", "a")
    assert answers("--out", "b") == first
    assert (here / "a/read.png").read_bytes() == (here / "b/read.png").read_bytes()
    document(capsys, "--seed", "1", "--out", "b")
    assert (here / "a/read.png").read_bytes() != (here / "b/read.png").read_bytes()


def test_a_limit_of_tokens_is_told(capsys: Captured, here: Path) -> None:
    assert main(["demo", "--max-tokens", "1"]) == 0
    assert "raise --max-tokens" in capsys.readouterr().err


# what it saves


def test_saved_pictures_are_those_that_are_asked_about(capsys: Captured, here: Path) -> None:
    assert document(capsys)["out"] == "phisight-demo"
    assert {*names_in(here / "phisight-demo"), "ground-answer.png"} == FILES
    for task in TASKS:
        pictures = sample(task, 15).pictures
        names = [task] if len(pictures) == 1 else [f"{task}-{n}" for n in range(1, len(pictures) + 1)]
        for name, pixels in zip(names, pictures, strict=True):
            with Image.open(here / f"phisight-demo/{name}.png") as image:
                np.testing.assert_array_equal(np.asarray(image), pixels)


def test_files_of_others_are_never_replaced(capsys: Captured, here: Path) -> None:
    folder = here / "phisight-demo"
    folder.mkdir()
    for name in ("two_images-2.png", "ground-answer.png"):
        foreign = folder / name
        Image.new("RGB", (8, 8)).save(foreign)
        before = foreign.read_bytes()
        assert main(["demo"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{Path('phisight-demo', name)} exists and is no picture of phisight demo" in err
        assert names_in(folder) == [name]  # nothing was saved beside it
        assert foreign.read_bytes() == before
        foreign.unlink()
    (folder / "notes.txt").write_text("mine")
    for seed in ("0", "1"):  # its own pictures are
        assert main(["demo", "--seed", seed]) == 0
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"a text", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_belongs_to_others(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "read.png").write_bytes(content)
    with pytest.raises(InputError, match="exists and is no picture"):
        Album(tmp_path).save("read", np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "read.png").read_bytes() == content


def test_a_folder_that_cannot_be_used(capsys: Captured, here: Path) -> None:
    (here / "file").write_text("no folder")
    for out in ("file", "file/below"):
        assert main(["demo", "--out", out]) == 2
        assert "another" in capsys.readouterr().err
    assert main(["demo", "--model", "none", "--out", "new"]) == 2
    assert "none is not there" in capsys.readouterr().err
    assert main(["demo", "--max-tokens", "0", "--out", "new"]) == 2
    assert "max_tokens is 0" in capsys.readouterr().err
    assert names_in(here) == ["file"]


def answer(text: str, thought: str = "") -> Answer:
    return Answer(text, thought, "stop", Stats(0.1, 0.2, 0.3, 0.5, 1, 0, 60, 9, 0, 69, 0, 3, 2, None))


def test_the_box_of_an_answer_is_drawn_into_a_copy(tmp_path: Path) -> None:
    exhibit, album = Exhibit(sample("ground", 0), ()), Album(tmp_path)
    right = judge(exhibit, answer(exhibit.sample.question.answer), album)
    assert right.verdict.right
    assert right.verdict.overlap is not None
    assert right.verdict.overlap > 0.8
    assert right.marked == tmp_path / "ground-answer.png"
    x1, y1, _, _ = right.box or (0, 0, 0, 0)
    with Image.open(right.marked) as image:
        assert image.getpixel((round(x1 * image.width), round(y1 * image.height))) == OUTLINE
    assert not judge(exhibit, answer("[0.00, 0.00, 0.01, 0.01]"), album).verdict.right
    boxless = judge(exhibit, answer("the button"), album)
    assert (boxless.verdict.right, boxless.box, boxless.marked) == (False, None, None)


@pytest.mark.parametrize(
    "box", [(0.9, 0.9, 0.1, 0.1), (0.5, 0.5, 7.0, 99.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)]
)
def test_any_box_can_be_drawn(box: tuple[float, float, float, float]) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    marked = with_box(pixels, box)
    assert marked.shape == pixels.shape
    assert (marked == OUTLINE).all(axis=-1).any()
    assert not pixels.any()


# on a terminal


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def on_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Runs the demo with standard output on a terminal; returns what it and standard error got."""

    def run(*arguments: str, encoding: str = "utf-8", **environment: str) -> tuple[str, str]:
        out, err = Terminal(encoding), io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        for name in ("NO_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm", "COLUMNS": "60"} | environment).items():
            monkeypatch.setenv(name, value)
        assert main(["demo", *arguments]) == 0
        return out.text(), err.getvalue()

    return run


def pictures(text: str) -> list[list[str]]:
    """Lines of half blocks that follow one another, without colours."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    shown: list[list[str]] = [[]]
    for line in plain:
        if line.strip("▀▄█ ") == "" and line.strip():
            shown[-1].append(line)
        elif shown[-1]:
            shown.append([])
    return shown[:-1]


@pytest.mark.skipif(sys.platform == "win32", reason="this stream is no console")
def test_pictures_fit_the_terminal(on_terminal: Callable[..., tuple[str, str]]) -> None:
    out, err = on_terminal(COLORTERM="truecolor")
    assert err == ""
    assert "\x1b[38;2;" in out
    shown = pictures(out)
    assert len(shown) == 5  # one of each task but arithmetic; two of them side by side
    assert all(len(lines) <= 16 and len(line) < 60 for lines in shown for line in lines)
    assert all("    " in line for line in shown[-1])
    assert "\x1b[38;5;" in on_terminal(TERM="xterm-256color")[0]


def test_pictures_without_colours(on_terminal: Callable[..., tuple[str, str]]) -> None:
    out, err = on_terminal(COLORTERM="truecolor", NO_COLOR="1")
    assert err == "phisight: note: the pictures are shown without colours: NO_COLOR is set\n"
    assert not re.search(r"\x1b\[[34]8", out)
    assert "█" in out


def test_a_code_page_without_half_blocks(on_terminal: Callable[..., tuple[str, str]]) -> None:
    out, err = on_terminal(encoding="cp1252", COLORTERM="truecolor")
    assert err.startswith("phisight: note: the pictures are not shown: the terminal's encoding is cp1252")
    assert err.count("\n") == 1
    assert not re.search(r"\x1b\[[34]8|\?\?", out)
    assert "6 of 6" in out


def test_no_pictures(on_terminal: Callable[..., tuple[str, str]], here: Path) -> None:
    out, err = on_terminal("--no-pictures", COLORTERM="truecolor")
    assert "▀" not in out
    assert err == ""
    assert (here / "phisight-demo/read.png").is_file()


def test_a_thought_is_dim_and_before_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    transcript = Transcript(demo.Console(), None)
    exhibit = Exhibit(sample("arithmetic", 0), ())
    transcript.begin(exhibit, 1, 1)
    for chunk in (Chunk("3*3", "thought"), Chunk("=9", "thought"), Chunk("90"), Chunk("", finish_reason="stop")):
        transcript.show(chunk)
    transcript.end(judge(exhibit, answer(exhibit.sample.question.answer, "3*3=9"), Album(Path())))
    lines = stream.text().splitlines()
    assert lines[2:5] == ["\x1b[2mthought   3*3\x1b[0m\x1b[2m=9\x1b[0m", "answer    90", "          right"]
    assert lines[5].endswith("first token after 0.60 s; 3 tokens, 4 tokens/s")


def test_a_thought_without_an_answer(capsys: Captured) -> None:
    transcript = Transcript(demo.Console(), None)
    exhibit = Exhibit(sample("arithmetic", 0), ())
    transcript.begin(exhibit, 1, 1)
    transcript.show(Chunk("3*3", "thought"))
    transcript.end(judge(exhibit, answer("", "3*3"), Album(Path())))
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "thought   3*3",
        "answer    (none)",
        f"          wrong: it is {exhibit.sample.question.answer}",
    ]


# ends that are not its own


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_an_interrupt(capsys: Captured, monkeypatch: pytest.MonkeyPatch, here: Path, arguments: list[str]) -> None:
    judged = 0

    def interrupted_judge(*arguments: Any) -> Any:
        nonlocal judged
        judged += 1
        if judged == 2:
            signal.raise_signal(signal.SIGINT)
        return judge(*arguments)

    monkeypatch.setattr(demo, "judge", interrupted_judge)
    assert main(["demo", *arguments]) == 130
    out, err = capsys.readouterr()
    assert err == "phisight: interrupted\n"
    assert out.endswith("\n") or not out
    assert not list(here.rglob("*.partial"))


def test_a_reader_that_has_gone_is_left_quietly(here: Path) -> None:
    running = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    error = running.stderr.read()
    running.stderr.close()
    assert (running.wait(), error) == (1, b"")


def test_a_piped_code_page(here: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "COLORTERM": "truecolor"}
    done = subprocess.run(COMMAND, capture_output=True, env=environment, check=True)
    assert done.stderr == b""
    assert "6 of 6" in done.stdout.decode("cp1252")


# the built-in model as a checkpoint


def test_the_checkpoint_goes_into_a_gguf_as_any_other(capsys: Captured, here: Path) -> None:
    assert main(["info", "demo", "--json"]) == 0
    checkpoint = json.loads(capsys.readouterr().out)["checkpoint"]
    plans = []
    for source in ("demo", checkpoint):
        assert main(["export", source, "out", "--format", "gguf", "--dry-run", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]
    assert plans[0]["dry_run"]
    assert names_in(here) == []
