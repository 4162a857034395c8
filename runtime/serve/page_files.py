"""The page for people, with all that it loads: the files below page/, at / and below /page/."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

__all__ = ["PageFiles", "page"]

FOLDER = Path(str(files("phisight"))) / "serve" / "page"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere, and runs nothing that stands in an answer."""

# Python asks the system for a file's type, on Windows the registry, where other programs may have written text/plain
# for .js: no browser runs a module of that type.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


async def page(_: Request) -> Response:
    """The page itself."""
    return _typed(FileResponse(FOLDER / "index.html", headers={"Content-Security-Policy": POLICY}), ".html")


class PageFiles(StaticFiles):
    """What the page loads, each file of its own type whatever the system says."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    def file_response(self, full_path: Any, *args: Any, **options: Any) -> Response:
        return _typed(super().file_response(full_path, *args, **options), Path(full_path).suffix)


def _typed(response: Response, suffix: str) -> Response:
    response.headers["Content-Type"] = TYPES[suffix]
    return response
