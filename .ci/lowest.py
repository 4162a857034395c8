"""Runs the tests with the oldest versions that pyproject.toml admits.

    python .ci/lowest.py [PYTEST ARGUMENTS]

Makes a virtual environment in a temporary directory, pins every direct requirement to its lower bound, installs the
project and runs pytest. Tools for linting are left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("cpu", "export", "gguf", "heif", "serve", "test")
TOOLS = ("ruff", "mypy")


def lowest() -> list[str]:
    """`name==bound` of every direct requirement; of two bounds on the same package the higher one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for requirement in project["dependencies"] + [r for e in EXTRAS for r in project["optional-dependencies"][e]]:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if match is None:
            raise SystemExit(f"{requirement} has no lower bound of the form name>=version")
        name, bound = match.groups()
        if name not in TOOLS:
            found[name] = max(found.get(name, "0"), bound, key=lambda v: [int(part) for part in v.split(".")])
    return [f"{name}=={bound}" for name, bound in found.items()]


def main() -> int:
    pins = lowest()
    print("\n".join(pins), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True)
        return subprocess.run([python, "-m", "pytest", "-q", *sys.argv[1:]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
