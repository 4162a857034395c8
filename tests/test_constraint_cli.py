"""--schema, --json-object and --grammar on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import phisight
from phisight.cli.main import main

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
PRICE = ("What does the text say?", "--image", str(PICTURES / "price.png"), "--temperature", "0", "--mode", "nothink")
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 8}},
    "required": ["text"],
    "additionalProperties": False,
}

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def schema(tmp_path: Path) -> str:
    path = tmp_path / "answer.schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")  # with a byte order mark, as some editors write
    return str(path)


@pytest.fixture
def grammar(tmp_path: Path) -> str:
    path = tmp_path / "answer.lark"
    path.write_text('start: "[" /[0-9]{2}/ "]"', encoding="utf-8")
    return str(path)


def test_standard_output_is_the_form_that_was_asked_for(schema: str, grammar: str, capsys: Captured) -> None:
    assert main(["run", "demo", *PRICE, "--schema", schema]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == ["text"] and err == ""
    assert main(["run", "demo", *PRICE, "--grammar", grammar]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("[") and out.endswith("]\n") and len(out) == 5
    assert main(["run", "demo", *PRICE, "--json-object", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("{")


def test_incomplete_json_is_said(schema: str, grammar: str, capsys: Captured) -> None:
    assert main(["run", "demo", *PRICE, "--schema", schema, "--max-tokens", "4"]) == 0
    assert "before its end: the JSON is incomplete" in capsys.readouterr().err
    assert main(["run", "demo", *PRICE, "--grammar", grammar, "--max-tokens", "2"]) == 0
    err = capsys.readouterr().err
    assert "before its end" in err and "JSON" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "objekt"}', "the JSON schema cannot be used: Invalid type: objekt"),
        ("{", "the JSON schema is not JSON"),
        ("3", "the JSON schema is of type int"),
    ],
)
def test_a_bad_schema_is_told_before_the_model_is_opened(
    text: str, message: str, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    for command in (["run", "no-such-model", "?"], ["chat", "no-such-model"]):
        assert main([*command, "--schema", str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err and "no-such-model" not in err


def test_files_that_cannot_be_read_and_forms_that_exclude_each_other(schema: str, capsys: Captured) -> None:
    assert main(["run", "demo", "?", "--schema", "nowhere.json"]) == 2
    assert "nowhere.json cannot be read" in capsys.readouterr().err
    assert main(["run", "demo", "?", "--schema", schema, "--json-object"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_the_missing_package_is_named(schema: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main(["run", "demo", *PRICE, "--schema", schema]) == 1
    assert 'pip install "phisight[schema]"' in capsys.readouterr().err


def test_the_form_belongs_to_a_batch(schema: str, grammar: str, tmp_path: Path, capsys: Captured) -> None:
    """Answers of another form are not taken for those that are wanted."""
    cases, out = tmp_path / "cases.jsonl", tmp_path / "answers.jsonl"
    cases.write_text(json.dumps({"prompt": "Hello", "temperature": 0, "mode": "nothink"}), encoding="utf-8")
    command = ["batch", "demo", str(cases), "--out", str(out)]
    assert main([*command, "--schema", schema]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))
    assert list(json.loads(row["text"])) == ["text"]
    assert main([*command, "--schema", schema]) == 0  # kept
    assert "1 kept" in capsys.readouterr().err
    for other in ([], ["--grammar", grammar], ["--json-object"]):
        assert main([*command, *other]) == 2
        assert "answers to other cases" in capsys.readouterr().err
