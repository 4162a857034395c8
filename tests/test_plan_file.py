"""Plan files: what is read, and what is wrong with the others, by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from phisight.errors import InputError, PhisightError
from phisight.export.plan_file import read_plan, write_plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.json"


def test_both_forms(path: Path) -> None:
    path.write_text('{"a.weight": "Q6_K",\n "b.weight": {"type": "Q4_0", "kld": 0.5}}')
    plan = read_plan(path, "gguf")
    assert plan.types == (("a.weight", "Q6_K"), ("b.weight", "Q4_0"))
    assert plan.at("b.weight") == f"{path}: line 2"
    write_plan(path, {"schema": 1, "format": "gguf", "target": "5bpw", "tensors": {"a.weight": {"type": "Q6_K"}}})
    assert read_plan(path, "gguf").types == (("a.weight", "Q6_K"),)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": "Q6_K",\n\n "b" "Q4_0"}', "line 3: Expecting ':' delimiter"),
        ("[]", "line 1: the plan is a JSON list, wanted an object of types by tensor"),
        ("3", "line 1: the plan is a JSON int, wanted an object"),
        ("{}", "line 1: the plan names no tensor"),
        ('{"a": "Q6_K",\n "b": 4}', "line 2: b has the type 4, wanted a name"),
        ('{"a": {\n "type": null}}', "line 1: a has no type, wanted a name"),
        ('{"a": "Q6_K",\n "b": "Q4_0",\n "a": "Q4_0"}', "line 3: a stands there a second time"),
        ('{"schema": 2, "tensors": {"a": "Q6_K"}}', "schema is 2, this version of phisight reads 1"),
        ('{"schema": 1, "format": "onnx", "tensors": {"a": "f16"}}', "of format 'onnx', and --format is gguf"),
        ('{"schema": 1,\n "tensors": ["a"]}', "line 2: tensors is no object"),
        ('{"schema": 1, "target": "5bpw"}', "line 1: tensors is no object"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, said: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_plan(path, "gguf")
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_cannot_be_read_or_written(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_plan(path, "gguf")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8 from byte 7 on"):
        read_plan(path, "gguf")
    with pytest.raises(PhisightError, match="cannot be written"):
        write_plan(path / "no", {})
