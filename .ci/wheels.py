"""Resolves the `[cpu]` extra from binary wheels alone for every system that we name.

    python .ci/wheels.py

Prints a line per system; the exit code is 1 if one of them needs a compiler. Nothing is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
SYSTEMS = {
    "Linux x86_64": ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"],
    "Linux aarch64": [
        "manylinux_2_28_aarch64",
        "manylinux_2_27_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ],
    "Windows x64": ["win_amd64"],
    "Windows arm64": ["win_arm64"],
    "macOS arm64": [f"macosx_{major}_0_arm64" for major in (14, 13, 12, 11)],
}


def resolve(platforms: list[str], requirements: list[str]) -> list[str]:
    """Names and versions that pip would install. Raises CalledProcessError if a wheel is missing."""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", "--target", target]
        command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        for platform in platforms:
            command += ["--platform", platform]
        done = subprocess.run([*command, *requirements], check=True, capture_output=True, text=True)
    found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return sorted(f"{metadata['name']} {metadata['version']}" for metadata in found)


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["cpu"]
    failed = False
    for system, platforms in SYSTEMS.items():
        try:
            packages = resolve(platforms, requirements)
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{system}: FAILED: {error.stderr.strip().splitlines()[-1]}")
        else:
            print(f"{system}: {len(packages)} wheels: {', '.join(packages)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
