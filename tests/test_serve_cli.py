"""`phisight serve` as a program: it says where it serves, answers, and ends in order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phisight.cli.main import main

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")


@pytest.fixture
def program() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program and its address."""
    environment = os.environ | {"PHISIGHT_API_KEY": "from-the-environment"}
    command = [sys.executable, "-m", "phisight.cli.main", "serve", "demo", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving demo at (http://\S+)/v1", line):
            break
    else:
        pytest.fail("it ended before it served")
    try:
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_it_serves_until_it_is_interrupted(program: tuple[subprocess.Popen[str], str]) -> None:
    process, url = program
    body = {"model": "demo", "messages": [{"role": "user", "content": "How much is 3+53?"}]}
    for key, status in (("wrong", 401), ("from-the-environment", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == status
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "/v1/chat/completions 401" in said
    assert "/v1/chat/completions 200" in said
    assert said.endswith("phisight: stopped\n")
    assert "environment" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--max-queue", "-1"], "queue is -1"),
        (["--slots", "0"], "slots is 0"),
        (["--max-body", "0"], "--max-body is 0.0"),
        (["--port", "70000"], "wanted 0 to 65535"),
        (["--api-key-file", "missing.txt"], "missing.txt cannot be read"),
        (["--api-key", "with space"], "an API key"),
        (["--allow-origin", "example"], "the origin is 'example'"),
        (["--name", ""], "the model has no name"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHISIGHT_API_KEY", raising=False)
    assert main(["serve", "demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


def test_a_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("\n", encoding="utf-8")
    assert main(["serve", "demo", "--api-key-file", str(file)]) == 2
    assert "holds no key" in capsys.readouterr().err
