"""`phisight verify`: every file of a model directory against its SHA-256."""

from __future__ import annotations

import argparse

from phisight.cli.console import Console
from phisight.loading import model_directory
from phisight.manifest import Manifest

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight verify phi4-int4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory, or demo")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    directory = model_directory(args.model)
    manifest = Manifest.read(directory)
    size = sum(entry.bytes for entry in manifest.files.values())
    with console.progress("reading", size, "B") as bar:
        manifest.verify(directory, bar.add)
    if args.json:
        console.document({"path": str(directory), "files": len(manifest.files), "bytes": size, "ok": True})
    else:
        console.line(f"{directory}: {len(manifest.files)} files, {size / 1e6:,.1f} MB, all as exported")
    return 0
