"""The cache on disk: damage, limits, kills, and answers that are the same with and without it on both engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import phisight
from phisight.cli.main import main
from phisight.disk_cache import DiskCache, DiskCacheNotice
from phisight.model import Model
from phisight.model_cache import CacheIdentity

DEMO = Path(phisight.__file__).parent / "demo"
THIS_MODEL = CacheIdentity("this model", "its files")
PRICE = DEMO / "pictures/price.png"

WRITER = """
import sys
from pathlib import Path
from phisight.disk_cache import DiskCache
disk = DiskCache(Path(sys.argv[1]), limit=1 << 30)
print("ready", flush=True)
for number in range(10**6):
    disk.write(f"key {number}", bytes([number % 256]) * (4 << 20), 1.0)
"""


def test_entries_come_back_and_the_oldest_go(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "new", limit=3500, least_seconds=1)
    assert disk.read("a") is None
    disk.write("quick", b"x", 0.5)
    assert disk.entries() == []
    for name in "abc":
        disk.write(name, name.encode() * 1000, 1)
        time.sleep(0.02)
    assert disk.read("a") is not None  # used last
    disk.write("d", b"d" * 1000, 1)
    assert disk.read("b") is None
    for name in "acd":
        payload = disk.read(name)
        assert payload is not None and payload.tobytes() == name.encode() * 1000
    disk.write("large", b"x" * 4000, 1)
    assert disk.read("large") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_told_and_made_anew(tmp_path: Path, damage: str) -> None:
    disk = DiskCache(tmp_path)
    disk.write("key", b"value" * 100, 0)
    [(path, _)] = disk.entries()
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    with pytest.warns(DiskCacheNotice, match="ignored and removed"):
        assert disk.read("key") is None
    disk.write("key", b"value", 0)
    assert disk.read("key") is not None


def test_an_entry_of_older_files_is_told_and_made_anew(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path)
    disk.write("key", b"old", 0, "old files")
    with pytest.warns(DiskCacheNotice, match="have changed"):
        assert disk.read("key", "new files") is None
    disk.write("key", b"new", 0, "new files")
    payload = disk.read("key", "new files")
    assert payload is not None and payload.tobytes() == b"new"


def test_a_folder_that_cannot_be_written_costs_a_notice(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(DiskCacheNotice, match="cannot be written"):
        DiskCache(tmp_path / "file").write("key", b"value", 0)


def test_a_kill_while_writing_leaves_nothing_broken(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        process.kill()
    disk = DiskCache(tmp_path)
    for number in range(len(disk.entries())):
        assert disk.read(f"key {number}") is not None
    leftover = tmp_path / "old.part"
    leftover.touch()
    os.utime(leftover, (0, 0))
    disk.write("next", b"value", 0)
    assert disk.read("next") is not None and not leftover.exists()


@pytest.mark.parametrize("engine", ["onnx", "llama"])
def test_another_process_answers_alike_and_runs_less(
    engine: str, tmp_path: Path, exported_gguf: Callable[..., Path]
) -> None:
    if engine == "llama":
        pytest.importorskip("llama_cpp")
    path = exported_gguf(DEMO / "checkpoint", decoder="F32") if engine == "llama" else Path("demo")

    def opened(cached: bool) -> Model:
        model = phisight.load(str(path), threads=1, accuracy_level=0 if engine == "onnx" else None)
        if cached:
            model.use_cache(DiskCache(tmp_path / "cache"), THIS_MODEL, pictures=True)
        return model

    question = "What does the text say?"
    alone, first, second = (
        opened(cached).generate(question, [PRICE], options=phisight.load("demo").options(temperature=0))
        for cached in (False, True, True)
    )
    assert alone.text == first.text == second.text
    assert first.stats.reused_positions == 0
    assert second.stats.reused_positions >= second.stats.image_tokens
    assert second.stats.prefill_positions < first.stats.prefill_positions / 2
    other = opened(True)
    ids = [*range(100, 160)]
    run = other.generate_tokens(ids, options=other.options(temperature=0, max_tokens=3))
    plain = opened(False).generate_tokens(ids, options=other.options(temperature=0, max_tokens=3))
    assert [token.token_id for token in run] == [token.token_id for token in plain]
    assert run.timings.reused_positions == 0  # of another prompt nothing is taken


def test_a_state_that_does_not_fit_is_ignored(tmp_path: Path) -> None:
    model = phisight.load("demo", threads=1)
    disk = DiskCache(tmp_path)
    model.use_cache(disk, THIS_MODEL, pictures=True)
    options = model.options(temperature=0)
    right = model.generate("What does the text say?", [PRICE], options=options)
    again = phisight.load("demo", threads=1)
    again.use_cache(disk, THIS_MODEL, pictures=True)
    store = again._decoder.store
    assert store is not None
    store.state = lambda keys: memoryview(bytes(7))  # type: ignore[method-assign]
    with pytest.warns(DiskCacheNotice, match="kept beginning is ignored"):
        answer = again.generate("What does the text say?", [PRICE], options=options)
    assert answer.text == right.text and answer.stats.reused_positions == 0


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHISIGHT_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "cache"
    asked = ["run", "demo", "What does the text say?", "--image", str(PRICE), "--temperature", "0", "--json"]
    reused = []
    for more in (["--no-cache"], ["--cache", str(folder)], ["--cache", str(folder)], []):
        assert main([*asked, *more]) == 0
        reused.append(json.loads(capsys.readouterr().out)["stats"]["reused_positions"])
    assert reused[:2] == [0, 0] and reused[2] > 30 and reused[3] == 0
    assert not (tmp_path / "own").exists()  # the small model does not litter
    assert main([*asked, "--cache", str(folder), "--accuracy-level", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["reused_positions"] == 0  # opened otherwise
    assert main(["cache", "--cache", str(folder), "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] >= 2
    assert list(folder.iterdir()) == []
