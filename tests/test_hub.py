"""`phisight export owner/name`: fetched from a local stand-in of the hub, which can break connections."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from phisight.cli.main import main
from phisight.export.synth import synthesize

NAME = "someone/small-model"
PROGRAM = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # 10 MiB, more than these shards have
from phisight.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandIn:
    """A hub with one repository. `breaks` counts, by file, how many answers are cut off in the middle."""

    folder: Path
    url: str = ""
    breaks: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """File and Range of every GET."""

    def fetched(self, suffix: str) -> list[str]:
        """Files of this suffix that were fetched whole or from where they were cut off, not their headers alone."""
        return [name for name, part in self.asked if name.endswith(suffix) and not (part or "").startswith("bytes=0-")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name in the base class
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        api = f"/api/models/{NAME}"
        files = sorted(self.hub.folder.iterdir())
        if path in (api, f"{api}/revision/main"):
            names = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
            self._json({"id": NAME, "sha": COMMIT, "siblings": names, "private": False, "tags": [], "downloads": 0})
        elif path.startswith(f"{api}/tree/"):
            self._json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files])
        elif (found := re.fullmatch(f"/{NAME}/resolve/(?:main|{COMMIT})/(.+)", path)) and (
            self.hub.folder / found[1]
        ).is_file():
            self._file(self.hub.folder / found[1], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if NAME in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, file: Path, body: bool) -> None:
        data = file.read_bytes()
        part = self.headers.get("Range")
        start, stop = 0, len(data)
        if part is not None and (numbers := re.fullmatch(r"bytes=(\d+)-(\d*)", part)):
            start = int(numbers[1])
            stop = min(stop, int(numbers[2]) + 1) if numbers[2] else stop
        self.send_response(200 if part is None else 206)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if part is not None:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if not body:
            return
        self.hub.asked.append((file.name, part))
        if part is None or not part.startswith("bytes=0-"):
            left = self.hub.breaks.get(file.name, 0)
            if left:
                self.hub.breaks[file.name] = left - 1
                self.wfile.write(data[start : start + (stop - start) // 2])
                self.close_connection = True
                return
        self.wfile.write(data[start:stop])


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    synthesize(folder, layers=6, width="tiny")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an export of the repository's files is, when they are simply there."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["export", str(repository), str(out)]) == 0
    return _contents(out)


@pytest.fixture
def hub(repository: Path) -> Iterator[StandIn]:
    stand_in = StandIn(repository)
    handler = type("Bound", (Handler,), {"hub": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _export(hub: StandIn, folder: Path, *options: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    """A process of its own, since the hub's library reads its environment when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", PROGRAM, "export", name, str(folder / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_all_is_fetched_first_and_only_once(hub: StandIn, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = _export(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fetching 0.00 GB" in done.stderr
    assert _contents(tmp_path / "out") == whole
    hub.asked.clear()
    assert _export(hub, tmp_path, "--force").returncode == 0
    assert hub.asked == []


def test_a_download_that_breaks_goes_on(hub: StandIn, whole: dict[str, bytes], tmp_path: Path) -> None:
    shard = sorted(hub.folder.glob("*.safetensors"))[1].name
    hub.breaks[shard] = 3
    for _ in range(3):
        done = _export(hub, tmp_path)
        if done.returncode == 0:
            break
        assert done.returncode == 1
        assert "the same command goes on from there" in done.stderr
    assert _contents(tmp_path / "out") == whole
    parts = [part for name, part in hub.asked if name == shard]
    assert parts[0] is None
    assert all(part is not None and not part.startswith("bytes=0-") for part in parts[1:])


def test_shard_by_shard(hub: StandIn, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = _export(hub, tmp_path, "--stream-shards")
    assert done.returncode == 0, done.stderr
    assert _contents(tmp_path / "out") == whole
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    shards = hub.fetched(".safetensors")
    assert sorted(shards) == sorted(path.name for path in hub.folder.glob("*.safetensors")), "each of them once"


def test_a_dry_run_fetches_no_weights(hub: StandIn, tmp_path: Path) -> None:
    done = _export(hub, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "int4 block 32" in done.stdout
    assert hub.fetched(".safetensors") == []


def test_a_repository_that_is_not_there(hub: StandIn, tmp_path: Path) -> None:
    done = _export(hub, tmp_path, name="someone/else")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "no public repository someone/else" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_path_comes_before_a_repository(hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    done = _export(hub, tmp_path)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert hub.asked == []
    assert main(["export", "demo", str(tmp_path / "out"), "--stream-shards"]) == 2
    assert "goes with a repository of the hub" in capsys.readouterr().err


def test_calibration_needs_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", NAME, str(tmp_path / "out"), "--stream-shards", "--method", "gptq"]) == 2
    assert "--stream-shards reads each shard once" in capsys.readouterr().err
