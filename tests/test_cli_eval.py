"""`phisight eval` on the built-in model: the document and the table, from tasks and from a folder of cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phisight
from phisight.cli import eval as eval_command
from phisight.cli import temporary_export
from phisight.cli.main import main
from phisight.evaluate.run import _ask
from phisight.loading import checkpoint_directory
from phisight.tasks import TASKS

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
READ = "What does the text say?"
PRICE = {"image": "price.png", "question": READ, "expected": "$6.75"}
CHART = {"image": "chart.png", "question": "What is the value of the orange bar?", "expected": 3}

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures, away from the current one."""
    made = tmp_path / "ours"
    made.mkdir()
    for name in ("price.png", "chart.png"):
        shutil.copyfile(PICTURES / name, made / name)
    return made


def write(folder: Path, *cases: object) -> None:
    lines = [case if isinstance(case, str) else json.dumps(case) for case in cases]
    (folder / "cases.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def evaluate(*arguments: str | Path, code: int = 0) -> None:
    assert main(["eval", *map(str, arguments)]) == code


def document(capsys: Captured, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    evaluate(*arguments, "--json", code=code)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: Captured, *arguments: str | Path) -> str:
    """What is said of a run that cannot begin."""
    capsys.readouterr()
    evaluate(*arguments, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("phisight: error: ")
    return err


def test_the_document(capsys: Captured) -> None:
    found = document(capsys, "demo", "--n", "3", "--seed", "7")
    assert list(found["tasks"]) == ["read", "chart", "ground", "count", "arithmetic", "two_images"]
    assert (found["model"], found["seeds"], found["mode"], found["max_tokens"]) == ("demo", [7, 9], "auto", 96)
    assert (found["blank"], found["interrupted"]) == (False, False)
    for task, report in found["tasks"].items():
        assert (report["n"], report["planned"], report["errors"]) == (3, 3, [])
        share = report["box_hit" if task == "ground" else "exact_match"]
        assert ("exact_match" in report, "mean_iou" in report) == (task != "ground", task == "ground")
        assert share == report["right"] / 3
        assert report["interval"][0] <= share <= report["interval"][1]
        assert 1 / 3 <= report["constant_answer"] <= 1
        assert sum(kind["n"] for kind in report["kinds"].values()) == 3
        assert sum(shape["n"] for shape in report["aspect_ratios"].values()) == (0 if task == "arithmetic" else 3)
        assert report["generated_tokens"] > report["thought_tokens"] >= 0


def test_the_table(capsys: Captured) -> None:
    evaluate("demo", "--tasks", "ground,read", "--n", "2", "--blank")
    out, err = capsys.readouterr()
    header, ground, read = out.splitlines()
    assert header.split()[:3] == ["task", "questions", "right"]
    assert ground.split()[:2] == ["ground", "2"]
    assert "mean IoU 0." in ground
    assert read.split()[:2] == ["read", "2"]
    assert err.startswith("4 questions in ")
    assert "even grey" in err


def test_the_same_seeds_give_the_same_answers(capsys: Captured) -> None:
    arguments = ("demo", "--tasks", "chart", "--n", "4")
    first, second = (document(capsys, *arguments)["tasks"]["chart"] for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}
    other = document(capsys, *arguments, "--seed", "4")["tasks"]["chart"]
    both = document(capsys, "demo", "--tasks", "chart", "--n", "8")["tasks"]["chart"]
    assert both["right"] == first["right"] + other["right"]
    assert both["generated_tokens"] == first["generated_tokens"] + other["generated_tokens"]


def test_modes(capsys: Captured) -> None:
    arguments = ("demo", "--tasks", "arithmetic", "--n", "5")
    thinking = document(capsys, *arguments, "--mode", "think")["tasks"]["arithmetic"]
    direct = document(capsys, *arguments, "--mode", "nothink")["tasks"]["arithmetic"]
    assert (thinking["thoughts"], direct["thoughts"]) == (5, 0)
    assert thinking["thought_tokens"] > 0 == direct["thought_tokens"]
    cut = document(capsys, *arguments, "--mode", "think", "--max-tokens", "2")
    assert (cut["max_tokens"], cut["tasks"]["arithmetic"]["cut"]) == (2, 5)
    evaluate(*arguments, "--mode", "think", "--max-tokens", "2")
    assert "5 answers were cut by --max-tokens 2" in capsys.readouterr().err


def test_a_folder_of_cases(folder: Path, capsys: Captured) -> None:
    pair = {"image": ["price.png", "chart.png"], "question": READ, "expected": "?", "metric": "contains"}
    write(folder, PRICE | {"task": "prices", "id": "p"}, CHART, pair, PRICE | {"task": "prices", "mode": "think"})
    found = document(capsys, "demo", "--tasks", folder)
    assert (found["seeds"], found["max_tokens"]) == (None, None)
    assert list(found["tasks"]) == ["prices", "cases"]
    prices, cases = found["tasks"].values()
    assert (prices["n"], prices["exact_match"], prices["thoughts"], prices["kinds"]) == (2, 1.0, 1, {})
    assert (cases["n"], cases["number_match"], cases["contains_match"]) == (2, 1.0, 0.0)
    blank = document(capsys, "demo", "--tasks", folder, "--blank")["tasks"]
    assert blank["prices"]["exact_match"] == 0.0
    assert document(capsys, "demo", "--tasks", folder, "--n", "1")["tasks"]["prices"]["n"] == 1


def test_bad_lines_are_told_before_the_model_is_opened(folder: Path, capsys: Captured) -> None:
    write(folder, PRICE, "nonsense", CHART | {"image": "none.png"}, PRICE | {"metric": "number"})
    lines = refused(capsys, folder / "no-model", "--tasks", folder).splitlines()
    assert [line.split(":")[1] for line in lines] == [" line 2", " line 3", " line 4", " error"]
    assert "3 cases cannot be asked" in lines[-1]


def test_a_damaged_picture_is_a_counted_failure(folder: Path, capsys: Captured, tmp_path: Path) -> None:
    (folder / "bad.png").write_bytes((PICTURES / "price.png").read_bytes()[:300])
    write(folder, PRICE | {"image": "bad.png", "id": "bad"}, PRICE)
    wrong = tmp_path / "wrong"
    found = document(capsys, "demo", "--tasks", folder, "--save-failures", wrong, code=1)["tasks"]["cases"]
    assert (found["n"], found["right"], len(found["errors"])) == (2, 1, 1)
    assert "bad.png is damaged" in found["errors"][0]["error"]
    (row,) = (json.loads(line) for line in (wrong / "failures.jsonl").read_text().splitlines())
    assert (row["line"], row["id"], row["answer"], row["pictures"]) == (1, "bad", "", [])
    assert row["error"] == found["errors"][0]["error"]
    evaluate("demo", "--tasks", folder, code=1)
    assert "phisight: cases, line 1: " in capsys.readouterr().err


def test_failures_of_drawn_tasks(tmp_path: Path, capsys: Captured) -> None:
    wrong = tmp_path / "wrong"
    report = document(capsys, "demo", "--tasks", "ground", "--n", "4", "--blank", "--save-failures", wrong)["tasks"][
        "ground"
    ]
    rows = [json.loads(line) for line in (wrong / "failures.jsonl").read_text().splitlines()]
    assert len(rows) == 4 - report["right"]
    for row in rows:
        assert set(row) >= {"question", "expected", "answer", "thought", "seed", "iou", "kind"}
        assert row["pictures"] == [f"ground-{row['seed']}.png"]
        assert (wrong / row["pictures"][0]).is_file()
    assert "is not empty" in refused(capsys, "demo", "--save-failures", wrong)


def test_an_interrupt_tells_what_was_done(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    asked = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 6:
            raise KeyboardInterrupt
        return _ask(*arguments)

    monkeypatch.setattr("phisight.evaluate.run._ask", interrupted)
    found = document(capsys, "demo", "--tasks", "arithmetic,read,chart", "--n", "3", code=130)
    assert found["interrupted"] is True
    assert {task: report["n"] for task, report in found["tasks"].items()} == {"arithmetic": 3, "read": 2}
    asked = 0
    evaluate("demo", "--tasks", "arithmetic,read,chart", "--n", "3", code=130)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("(interrupted: 2 of 3)")
    assert err.splitlines()[-1] == "phisight: interrupted"


def test_a_checkpoint_is_exported_in_passing(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ("--tasks", "arithmetic,count", "--n", "3")
    exported = document(capsys, "demo", *arguments)["tasks"]
    found = document(capsys, checkpoint_directory("demo"), *arguments)["tasks"]
    assert {task: report["right"] for task, report in found.items()} == {
        task: report["right"] for task, report in exported.items()
    }
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(temporary_export, "MOST_BYTES", 1 << 20)
    assert "OUT --decoder int4" in refused(capsys, checkpoint_directory("demo"), *arguments)


def test_a_gguf_pair(capsys: Captured, exported_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    directory = exported_gguf(checkpoint_directory("demo"), decoder="F16")
    text, mmproj = directory / "model-f16.gguf", directory / "mmproj-f16.gguf"
    found = document(capsys, text, "--mmproj", mmproj, "--n", "1", "--threads", "1")["tasks"]
    assert {task: report["n"] for task, report in found.items()} == dict.fromkeys(TASKS, 1)
    assert "without its mmproj" in refused(capsys, text, "--tasks", "arithmetic,read")
    assert (
        document(capsys, text, "--tasks", "arithmetic", "--n", "1", "--threads", "1")["tasks"]["arithmetic"]["n"] == 1
    )


def test_what_cannot_be_begun(folder: Path, capsys: Captured, tmp_path: Path) -> None:
    assert "--tasks is 'read,raed': give demo, some of read," in refused(capsys, "demo", "--tasks", "read,raed")
    assert "cases.jsonl cannot be read" in refused(capsys, "demo", "--tasks", tmp_path)
    assert "--n is 0" in refused(capsys, "demo", "--n", "0")
    assert "--seed is -1" in refused(capsys, "demo", "--seed", "-1")
    assert "max_tokens is 0" in refused(capsys, "demo", "--max-tokens", "0")
    assert "max_patches is 5000" in refused(capsys, "demo", "--max-patches", "5000")
    assert "not there" in refused(capsys, tmp_path / "none", "--save-failures", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    write(folder, PRICE)
    assert "--seed is for drawn questions" in refused(capsys, "demo", "--tasks", folder, "--seed", "1")
    assert eval_command.DEFAULT_N == 100
