"""An export that is killed, interrupted or out of disk goes on where it was, to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phisight.cli.main import main
from phisight.errors import InputError, PhisightError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, export_onnx, plan_export, plan_gguf
from phisight.export.gguf_plan import GgufOptions
from phisight.export.journal import Journal, Mark
from phisight.export.output import OutputDirectory, OutputFile
from phisight.export.plan import ExportOptions

SLOW = """
import sys, time
from phisight.cli.main import main
from phisight.export.output import OutputFile
write = OutputFile.write
begun = []
def slow(self, data):
    begun or begun.append(print("writing", file=sys.stderr, flush=True))
    time.sleep(0.002)
    write(self, data)
OutputFile.write = slow
sys.exit(main(sys.argv[1:]))
"""
"""The program, with a disk so slow that a kill meets it at work."""

FORMS = [["--decoder", "int4"], ["--format", "gguf", "--decoder", "q4_0"]]


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _export(checkpoint: Path, out: Path, form: str = "onnx", **options: Any) -> list[str]:
    """Export; returns what was told."""
    told: list[str] = []
    opened = Checkpoint.open(checkpoint)
    if form == "gguf":
        export_gguf(opened, plan_gguf(opened, GgufOptions(**options)), out, tell=told.append)
    else:
        export_onnx(opened, plan_export(opened, ExportOptions(**options)), out, tell=told.append)
    return told


def _fail_after(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> None:
    """Writing raises `error` when `most` bytes are written."""
    write, written = OutputFile.write, 0

    def failing(self: OutputFile, data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > most:
            raise error
        write(self, data)

    monkeypatch.setattr(OutputFile, "write", failing)


def _killed(checkpoint: Path, root: Path, options: list[str], kills: int) -> None:
    """Kill exports at random moments until so many were met at work, and compare what they come to."""
    assert main(["export", str(checkpoint), str(root / "whole"), *options]) == 0
    whole = _contents(root / "whole")
    moments = random.Random(0)
    out = root / "out"
    command = [sys.executable, "-c", SLOW, "export", str(checkpoint), str(out), *options]
    met, continued = 0, 0
    while met < kills:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stderr is not None
        told = list(iter(process.stderr.readline, "writing\n"))
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        met += process.returncode != 0
        continued += any("continuing" in line for line in told)
        if out.exists():
            assert _contents(out) == whole
            shutil.rmtree(out)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert _contents(out) == whole
    assert continued
    assert sorted(path.name for path in root.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("options", FORMS, ids=["onnx", "gguf"])
def test_killed_a_few_times(tiny_checkpoint: Path, tmp_path: Path, options: list[str]) -> None:
    _killed(tiny_checkpoint, tmp_path, options, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("options", FORMS, ids=["onnx", "gguf"])
def test_killed_at_fifty_moments(tiny_checkpoint: Path, tmp_path: Path, options: list[str]) -> None:
    _killed(tiny_checkpoint, tmp_path, options, kills=50)


@pytest.mark.parametrize("form", ["onnx", "gguf"])
@pytest.mark.parametrize("most", [0, 400_000, 700_000])
def test_a_full_disk_is_told_and_the_export_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, most: int
) -> None:
    _export(tiny_checkpoint, tmp_path / "whole", form)
    with monkeypatch.context() as patch:
        _fail_after(patch, most, OSError(28, "No space left on device"))
        with pytest.raises(PhisightError, match=r"No space left on device: [\d,]+ bytes are still .* has [\d,]+ free"):
            _export(tiny_checkpoint, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
    told = _export(tiny_checkpoint, tmp_path / "out", form)
    assert bool(told) == (most > 0)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_what_is_there_is_not_computed_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run quantises only what the first did not reach; its progress counts all."""
    opened = Checkpoint.open(tiny_checkpoint)
    plan = plan_export(opened, ExportOptions())
    with monkeypatch.context() as patch:
        _fail_after(patch, 3_000_000, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export_onnx(opened, plan, tmp_path / "out")
    written = 0

    def counting(self: OutputFile, data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        write(self, data)

    write = OutputFile.write
    monkeypatch.setattr(OutputFile, "write", counting)
    counted: list[int] = []
    manifest = export_onnx(opened, plan, tmp_path / "out", progress=counted.append)
    assert sum(counted) == plan.total_weights()
    assert written < sum(entry.bytes for entry in manifest.files.values()) - 2_000_000


@pytest.mark.parametrize("change", ["source", "options"])
def test_something_else_starts_anew_and_says_so(
    checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with monkeypatch.context() as patch:
        _fail_after(patch, 400_000, OSError(28, "No space left on device"))
        with pytest.raises(PhisightError):
            _export(checkpoint_copy, tmp_path / "out")
    if change == "source":
        weights = next(checkpoint_copy.glob("*.safetensors"))
        os.utime(weights, (1, 1))
    told = _export(checkpoint_copy, tmp_path / "out", block_size=64 if change == "options" else 32)
    assert len(told) == 1
    assert f"another {change}: it starts anew" in told[0]
    _export(checkpoint_copy, tmp_path / "whole", block_size=64 if change == "options" else 32)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_a_changed_byte_in_what_was_written_is_found(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _export(tiny_checkpoint, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _fail_after(patch, 400_000, OSError(28, "No space left on device"))
        with pytest.raises(PhisightError):
            _export(tiny_checkpoint, tmp_path / "out")
    begun = max((tmp_path / ".out.partial").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(begun.read_bytes())
    data[len(data) // 2] ^= 1
    begun.write_bytes(data)
    _export(tiny_checkpoint, tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        _fail_after(patch, 400_000, KeyboardInterrupt())
        assert main(["export", str(tiny_checkpoint), str(tmp_path / "out")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "out")]) == 0
    assert "continuing the begun export" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_to_one_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, "export", str(tiny_checkpoint), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / ".out.partial").exists():
            assert process.poll() is None
            time.sleep(0.001)
        with pytest.raises(InputError, match="another export to the same place"):
            _export(tiny_checkpoint, tmp_path / "out")
    assert process.returncode == 0


def test_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    """Every beginning of a journal is read up to its last whole line; other bytes are no journal."""
    path, identity = tmp_path / "journal", {"source": "a"}
    marks = [Mark(1, 10, "x"), Mark(2, 20, "y")]
    with Journal.open(path, identity) as journal:
        for mark in marks:
            journal.add("file", mark)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Journal.open(path, identity) as journal:
            found = journal.marks.get("file", [])
        assert found == marks[: max(0, whole[:length].count(b"\n") - 1)]
        assert path.read_bytes() == whole[: max(first, whole[:length].rfind(b"\n") + 1)]
    path.write_bytes(b"\x00\xff" * 100)
    with Journal.open(path, identity) as journal:
        assert journal.marks == {}


def test_a_file_goes_on_behind_its_last_good_mark(tmp_path: Path) -> None:
    identity = {"source": "a"}
    work = tmp_path / "work"
    work.mkdir()
    with Journal.open(tmp_path / "journal", identity) as journal, OutputDirectory(work, journal).open("f") as file:
        for unit in file.unwritten([b"one", b"two", b"three"]):
            file.write(unit)
    (work / "f").write_bytes(b"onetwoX")
    (work / "stray").write_bytes(b"of a kill")
    with Journal.open(tmp_path / "journal", identity) as journal:
        output = OutputDirectory(work, journal)
        with output.open("f") as file:
            assert file.units == 2
            for unit in file.unwritten([b"one", b"two", b"three"]):
                file.write(unit)
    assert (work / "f").read_bytes() == b"onetwothree"
    assert [path.name for path in work.iterdir()] == ["f"]
