"""The page's files: their types, whatever the system says about them, and what the browser is told to forbid."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phisight

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

FOLDER = Path(phisight.__file__).parent / "serve" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def url(serve: Callable[..., Any]) -> str:
    return str(serve().url)


def test_a_system_that_lies_about_types_breaks_no_module(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows takes the type of .js from the registry, where it may be text/plain: no browser would run it."""
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_, **__: ("text/plain", None))
    monkeypatch.setattr("starlette.responses.guess_type", lambda *_, **__: ("text/plain", None))
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert {file.suffix for file in files} == set(TYPES)
    for file in files:
        answer = httpx.get(f"{url}/page/{file.name}")
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        assert answer.headers["content-type"].partition(";")[0] == TYPES[file.suffix], file.name
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{url}/").headers["content-type"].startswith("text/html")


def test_nothing_but_the_page_s_own_files_is_told(url: str) -> None:
    policy = httpx.get(f"{url}/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py"):
        assert httpx.get(url + path).status_code == 404
