"""The system block that a template puts before every prompt: later processes find its KV cache on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from phisight.loading import model_directory
from phisight.manifest import FILE_NAME
from phisight.model_cache import LEAST_POSITIONS

BLOCK = "You answer questions about pictures. Think first, then answer in few words. " * 4
COMMAND = """
import sys
from phisight.cli import cache
from phisight.cli.main import main
cache.OWN_SECONDS = 0.0  # the small model is too quick for an entry
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The built-in model behind a template that begins with a long system block, as the 15B model's does."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory("demo"), directory)
    template = directory / "chat_template.jinja"
    block = f"<|im_start|>system<|im_sep|>{BLOCK}<|im_end|>"
    template.write_text(block + template.read_text(encoding="utf-8"), encoding="utf-8")
    manifest = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
    manifest["files"][template.name]["bytes"] = template.stat().st_size
    (directory / FILE_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    return directory


class Asked:
    """One command in a process of its own."""

    def __init__(self, model: Path, cache: Path, question: str, *more: str) -> None:
        said: Sequence[str] = ("run", str(model), question, "--temperature", "0", "--threads", "1", "--json", *more)
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *said],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PHISIGHT_CACHE": str(cache)},
        )
        self._read = False

    @property
    def answer(self) -> dict[str, object]:
        """What it printed, once it has ended."""
        if not self._read:
            out, self.notes = self._process.communicate(timeout=60)
            assert self._process.returncode == 0, self.notes
            self._document = json.loads(out)
            self._read = True
        return {"text": self._document["text"], **self._document["stats"]}


def test_a_second_process_runs_only_the_rest(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    alone = Asked(model, cache, "How much is 3+4?", "--no-cache").answer
    assert not cache.exists()
    both = [Asked(model, cache, "How much is 3+4?") for _ in range(2)]  # at the same time
    answers = [each.answer for each in both]
    assert [answer["text"] for answer in answers] == [alone["text"]] * 2
    (entry,) = cache.iterdir()  # one of the same name by both, and nothing left beside it
    another = Asked(model, cache, "How much is 5+4?").answer
    reused, run = another["reused_positions"], another["prefill_positions"]
    assert isinstance(reused, int) and isinstance(run, int)
    assert reused > LEAST_POSITIONS and run < 20 < reused
    again = Asked(model, cache, "How much is 3+4?").answer
    assert (again["text"], again["reused_positions"]) == (alone["text"], reused)

    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    damaged = Asked(model, cache, "How much is 3+4?")
    assert (damaged.answer["text"], damaged.answer["reused_positions"]) == (alone["text"], 0)
    assert "its checksum differs" in damaged.notes

    os.utime(model / "decoder.onnx", (0, 0))
    stale = Asked(model, cache, "How much is 3+4?")
    assert (stale.answer["text"], stale.answer["reused_positions"]) == (alone["text"], 0)
    assert "have changed" in stale.notes
    assert Asked(model, cache, "How much is 3+4?").answer["reused_positions"] == reused
