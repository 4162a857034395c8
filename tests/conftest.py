"""Shared fixtures: where the golden files lie, and how a test says that they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PHISIGHT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers produced by the official reference code."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip(f"the golden files are not at {path}: set PHISIGHT_SHARED to the folder that holds golden/")
    return path
