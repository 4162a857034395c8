"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phisight.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "$6.75" in capsys.readouterr().out


def test_files_and_commands_that_it_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in set(re.findall(r"`phisight ([a-z]+)", text)):
        assert command in COMMANDS, command
    paths = {
        path
        for path in re.findall(r"(?<![\w-])(?:runtime|export|quant|demo|bench|\.ci)/[\w./*]+\w\b", text)
        if "*" not in path
    }
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path
