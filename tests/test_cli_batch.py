"""Files of questions, on the built-in model: what each row says, and how a second run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phisight
from phisight.cli import batch
from phisight.cli.answer_rows import AnswerRows
from phisight.cli.cases import Question, read_cases
from phisight.cli.main import main
from phisight.errors import InputError

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
READ = "What does the text say?"
BAR = "What is the value of the orange bar?"
PRICE = {"id": "price", "prompt": READ, "image": "price.png"}
CHART = {"id": "chart", "prompt": BAR, "image": "chart.png"}
ONE_CASE = json.dumps(PRICE).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures, away from the current one."""
    made = tmp_path / "questions"
    made.mkdir()
    for name in ("price.png", "chart.png"):
        shutil.copyfile(PICTURES / name, made / name)
    return made


def write(folder: Path, cases: Sequence[object]) -> Path:
    """Cases as lines; a string is a line as it stands."""
    path = folder / "cases.jsonl"
    lines = [case if isinstance(case, str) else json.dumps(case) for case in cases]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run(folder: Path, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """Answer the folder's cases; the rows."""
    out = folder / "answers.jsonl"
    assert main(["batch", "demo", str(folder / "cases.jsonl"), "--out", str(out), *arguments]) == code
    return [json.loads(line) for line in out.read_text("ascii").splitlines()]


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, model: str = "demo") -> str:
    """The one line of a run that cannot begin."""
    capsys.readouterr()
    out = ["--out", str(folder / "answers.jsonl")] if "--out" not in arguments else []
    assert main(["batch", model, str(folder / "cases.jsonl"), *out, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("phisight: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_answers_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "\n" + READ}]
    write(
        folder,
        [
            PRICE | {"mode": "think", "temperature": 0},
            "",
            CHART,
            {"messages": [{"role": "user", "content": parts}], "images": [str(PICTURES / "price.png")], "stop": "."},
        ],
    )
    rows = run(folder, "--temperature", "0", "--json")
    assert [(row["line"], row["id"]) for row in rows] == [(1, "price"), (3, "chart"), (4, None)]
    assert [row["text"] for row in rows] == ["$6.75", "3", "$6"]  # as the pictures show; the last is cut at the point
    assert [bool(row["thought"]) for row in rows] == [True, False, False]
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert rows[0]["stats"]["image_tokens"] == 32
    assert rows[2]["stats"]["cached_images"] == 1  # the same pixels by another path
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    generated = sum(row["stats"]["generated_tokens"] for row in rows)
    wanted = {"cases": 3, "answered": 3, "kept": 0, "cut": 0, "errors": [], "generated_tokens": generated}
    assert summary.items() >= wanted.items()
    assert "3 answered" in captured.err


def test_the_command_line_gives_defaults_and_a_case_goes_before_them(folder: Path) -> None:
    write(folder, [PRICE | {"id": "limit"}, PRICE | {"id": "more", "max_tokens": 3}, PRICE | {"max_patches": 8}])
    rows = run(folder, "--temperature", "0", "--max-tokens", "2", "--max-patches", "16")
    assert [row["stats"]["generated_tokens"] for row in rows] == [2, 3, 2]
    assert [row["finish_reason"] for row in rows] == ["length"] * 3
    first, _, third = (row["stats"]["image_tokens"] for row in rows)
    assert third <= 8 < first <= 16


def test_a_system_message_heads_cases_without_one(folder: Path) -> None:
    own = [{"role": "system", "content": "Be brief, please."}, {"role": "user", "content": READ}]
    write(folder, [{"prompt": READ}, {"prompt": READ, "system": "none"}, {"messages": own}])
    cases = read_cases(folder / "cases.jsonl", {"system": "Be exact."})
    questions = [case.question for case in cases if isinstance(case.question, Question)]
    assert [len(question.messages) for question in questions] == [2, 1, 2]
    assert questions[0].messages[0] == {"role": "system", "content": "Be exact."}
    assert questions[2].messages == tuple(own)
    assert [question.system_block for question in questions] == ["keep", "none", "keep"]
    rows = run(folder, "--system", "Be exact.", "--max-tokens", "1")
    assert [len(row["notes"]) for row in rows] == [1, 1, 1]  # a system message is moved; no block to leave out


WRONG: list[tuple[object, str]] = [
    ("not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "JSON list"),
    ({"prompt": "x", "colour": 1, "size": 2}, "'colour', 'size'"),
    ({"image": "price.png"}, "neither prompt nor messages"),
    ({"prompt": "x", "messages": []}, "both prompt and messages"),
    ({"prompt": "x", "image": "a.png", "images": []}, "both image and images"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["x"]}, "message 1 is str"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 image slots, but 0 images"),
    ({"prompt": 5}, "prompt is 5"),
    ({"prompt": "x", "images": ["price.png", 3]}, "images has 3"),
    ({"prompt": "x", "image": "none.png"}, "none.png does not exist"),
    ({"prompt": "x", "image": "cases.jsonl"}, "cases.jsonl is not an image"),
    ({"prompt": "x", "mode": "fast"}, "mode is 'fast'"),
    ({"prompt": "x", "max_patches": True}, "max_patches is True"),
    ({"prompt": "x", "max_patches": 0, "image": "price.png"}, "max_patches is 0"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
    ({"prompt": "x", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "x", "stop": ["", "a"]}, "stop is ('', 'a')"),
    ({"prompt": "\ud800"}, "U+D800"),
    ({"prompt": "x", "id": 1.5}, "id is 1.5"),
    ({"prompt": "x", "id": "price"}, "id 'price' is that of line 1"),
    ({"prompt": "word " * 2000}, "the context holds 1024"),
]


def test_what_is_wrong_with_a_case_is_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, [PRICE, *(case for case, _ in WRONG)])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n" + json.dumps(CHART).encode())
    rows = run(folder, "--temperature", "0", "--json", code=1)
    assert [row["line"] for row in rows] == list(range(1, len(WRONG) + 4))
    assert (rows[0]["text"], rows[-1]["text"]) == ("$6.75", "3")
    for row, word in zip(rows[1:-1], [*(word for _, word in WRONG), "not UTF-8"], strict=True):
        assert word in row["error"]
        assert "\n" not in row["error"]
        assert "text" not in row
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert [error["line"] for error in summary["errors"]] == list(range(2, len(WRONG) + 3))
    assert summary["answered"] == 2
    assert "phisight: line 2: the line is not JSON" in captured.err
    assert f"and {len(WRONG) - 9} errors more" in captured.err  # ten are told


def test_a_second_run_answers_what_is_left(folder: Path) -> None:
    write(folder, [PRICE, CHART])
    first = run(folder)
    write(folder, [CHART | {"id": "new"}, PRICE, CHART, CHART | {"id": "last"}])
    second = run(folder)
    assert [row["id"] for row in second] == ["new", "price", "chart", "last"]  # the cases' order
    assert [row["line"] for row in second] == [1, 2, 3, 4]
    # Seeds are drawn: rows answered again would have others.
    assert [row["stats"] for row in second[1:3]] == [row["stats"] for row in first]
    assert run(folder) == second


def test_errors_are_tried_again(folder: Path) -> None:
    write(folder, ["not json", CHART | {"image": "later.png"}, PRICE])
    before = run(folder, code=1)
    assert ["error" in row for row in before] == [True, True, False]
    shutil.copyfile(PICTURES / "chart.png", folder / "later.png")
    write(folder, [CHART | {"id": 7}, CHART | {"image": "later.png"}, PRICE])
    after = run(folder)
    assert [row["id"] for row in after] == [7, "chart", "price"]
    assert after[2]["stats"] == before[2]["stats"]


def test_a_run_that_has_nothing_to_do_leaves_the_file_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, [PRICE])
    run(folder)
    before = (folder / "answers.jsonl").stat()
    run(folder)
    after = (folder / "answers.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "0 answered" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_half_written_line_is_repaired(folder: Path, cut: int) -> None:
    write(folder, [PRICE, CHART])
    whole = run(folder, "--temperature", "0")
    out = folder / "answers.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:cut])
    repaired = run(folder, "--temperature", "0")
    assert repaired[0] == whole[0]
    assert [row["text"] for row in repaired] == ["$6.75", "3"]
    out.write_bytes(lines[0][:cut])
    assert [row["text"] for row in run(folder, "--temperature", "0")] == ["$6.75", "3"]
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "cases.jsonl", "chart.png", "price.png"]


def test_an_interrupt_keeps_what_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, [PRICE, CHART, CHART | {"id": "again"}])
    answer, done = batch._answer, []

    def interrupted(*arguments: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return answer(*arguments)

    monkeypatch.setattr(batch, "_answer", interrupted)
    before = run(folder, code=130)
    assert [row["id"] for row in before] == ["price", "chart"]
    assert "2 of 3 cases are done" in capsys.readouterr().err
    monkeypatch.undo()
    after = run(folder)
    assert [row["id"] for row in after] == ["price", "chart", "again"]
    assert after[:2] == before


def test_answers_to_something_else_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, [PRICE, CHART])
    run(folder, "--max-tokens", "20")
    before = (folder / "answers.jsonl").read_bytes()
    assert "has 2 answers to other cases" in refused(folder, capsys)  # other options
    write(folder, [PRICE, CHART | {"prompt": "And now?"}])
    error = refused(folder, capsys, "--max-tokens", "20")
    assert "has 1 answers to other cases" in error
    assert "line 2, id 'chart'" in error
    assert (folder / "answers.jsonl").read_bytes() == before


def test_another_model_is_another_question(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(folder, [PRICE])
    run(folder)
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(Path(phisight.__file__).parent / "demo/onnx", copy)
    assert main(["batch", str(copy), str(folder / "cases.jsonl"), "--out", str(folder / "answers.jsonl")]) == 0
    copy.rename(other)
    manifest = json.loads((other / "phisight.json").read_text())
    manifest["files"]["decoder.onnx.data"]["sha256"] = "0" * 64
    (other / "phisight.json").write_text(json.dumps(manifest))
    assert "by another model" in refused(folder, capsys, model=str(other))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"\x89PNG\r\n\x1a\n\xff", b"hello\nworld\n", ONE_CASE.decode().encode("utf-16")],
    ids=["empty", "blank", "picture", "text", "utf-16"],
)
def test_a_file_without_cases_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (folder / "cases.jsonl").write_bytes(content)
    assert "no usable case" in refused(folder, capsys)
    assert not (folder / "answers.jsonl").exists()


def test_a_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    (folder / "cases.jsonl").write_bytes(b"\xef\xbb\xbf" + ONE_CASE + b"\r\n\r\n")
    assert [row["text"] for row in run(folder, "--temperature", "0")] == ["$6.75"]


def test_what_cannot_be_begun(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cases.jsonl cannot be read" in refused(folder, capsys)
    path = write(folder, [PRICE])
    assert "--out" in refused(folder, capsys, "--out", str(folder / "none" / "answers.jsonl"))
    assert "cannot be read" in refused(folder, capsys, "--out", str(folder))
    for other in (path, folder / "price.png"):
        before = other.read_bytes()
        assert "is no file of answers" in refused(folder, capsys, "--out", str(other))
        assert other.read_bytes() == before
    path.write_bytes(ONE_CASE)  # one line, without an end
    assert "is no file of answers" in refused(folder, capsys, "--out", str(path))
    assert "temperature is -1" in refused(folder, capsys, "--temperature", "-1")
    assert "not there" in refused(folder, capsys, model=str(tmp_path / "none"))
    assert not (folder / "answers.jsonl").exists()


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.text(st.characters(exclude_categories=[])) | st.integers(), min_size=1, max_size=6),
    cut=st.integers(0, 400),
)
def test_a_file_cut_anywhere_keeps_its_whole_rows(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | int], cut: int
) -> None:
    answers = AnswerRows(tmp_path_factory.mktemp("rows") / "answers.jsonl")
    rows = [{"line": n, "id": id_, "case": f"{n:x}", "text": str(id_)} for n, id_ in enumerate(ids, 1)]
    for row in rows:
        answers.append(row)
    assert answers.read() == rows
    written = answers._path.read_bytes()
    kept = written[:cut]
    answers._path.write_bytes(kept)
    # A row is whole when its last brace is there; only its line end may be missing.
    assert answers.read() == rows[: kept.count(b"\n") + (kept[-1:] == b"}" and written[cut : cut + 1] == b"\n")]
    answers.replace(rows)
    assert answers._path.read_bytes() == written


def test_equal_cases_have_keys_of_their_own(folder: Path) -> None:
    path = write(folder, [{"prompt": "x"}, {"prompt": "x"}, {"prompt": "y"}])
    keys = [case.key for case in read_cases(path, {})]
    assert len(set(keys)) == 3
    write(folder, [{"prompt": "y"}, {"prompt": "x"}])
    assert [case.key for case in read_cases(path, {})] == [keys[2], keys[0]]
    assert read_cases(path, {"seed": 1})[0].key != keys[2]
    with pytest.raises(InputError, match="line 1: the line is not JSON"):
        read_cases(write(folder, ["{"]), {})
