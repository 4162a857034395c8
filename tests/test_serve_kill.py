"""The server killed in the midst of requests and started again: what it kept on disk is whole, and used."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phisight.disk_cache import HEADER, MAGIC, DiskCache

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

SERVE = (
    sys.executable,
    "-m",
    "phisight.cli.main",
    "serve",
    "demo",
    "--port",
    "0",
    "--threads",
    "1",
    "--max-queue",
    "32",
)


class Program:
    """`phisight serve demo --cache DIR`, and what it says."""

    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen([*SERVE, "--cache", str(cache)], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"serving demo at (http://\S+)/v1", line):
                self.url = found[1]
                return
        pytest.fail(f"it ended before it served: {self.said}")

    def ask(self, seed: int, key: str = "any") -> Any:
        """About a picture that no other seed gives, as big as the small model takes them."""
        values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(values).resize((240, 160), Image.Resampling.NEAREST).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What does the text say?"}]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def kill(self) -> None:
        """SIGKILL, or what Windows has for it; then all that it said is known."""
        self.process.kill()
        self.said += self.process.communicate()[1]


@contextmanager
def running(cache: Path) -> Iterator[Program]:
    program = Program(cache)
    try:
        yield program
    finally:
        program.kill()
    assert "ignored" not in program.said, program.said
    assert "Traceback" not in program.said, program.said


def check_entries(cache: Path) -> int:
    """That each is whole; how many there are."""
    entries = DiskCache(cache).entries()
    for path, _ in entries:
        content = path.read_bytes()
        magic, _, checksum, size = HEADER.unpack(content[: HEADER.size])
        payload = content[HEADER.size :]
        assert (magic, size) == (MAGIC, len(payload))
        assert hashlib.blake2b(payload, digest_size=32).digest() == checksum
    return len(entries)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_in_the_midst_of_requests(tmp_path: Path, kills: int) -> None:
    chance = random.Random(5)
    with running(tmp_path) as program:
        first = program.ask(0)
    kept = check_entries(tmp_path)
    assert kept > 0
    for round_ in range(kills):
        with running(tmp_path) as program, ThreadPoolExecutor(8) as pool:

            def ask(number: int, program: Program = program) -> None:
                with suppress(httpx.TransportError):  # it was killed
                    program.ask(number, key=str(number % 8))

            pool.map(ask, range(1000 * (round_ + 1), 1000 * (round_ + 1) + 16))
            sleep(chance.uniform(0.05, 0.8))
            program.process.kill()
        assert check_entries(tmp_path) >= kept
        kept = check_entries(tmp_path)
    print(f"{kept} entries after {kills} kills")
    with running(tmp_path) as program:
        again = program.ask(0)
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # of a new process: from the disk
        assert program.ask(1)["usage"]["prompt_tokens_details"]["image_tokens"] > 0
