"""`phisight verify`: every file of a model directory against its SHA-256, and its tensors against the checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.errors import ModelDirError
from phisight.loading import checkpoint_directory, model_directory
from phisight.manifest import Manifest

if TYPE_CHECKING:
    from phisight.export.verification import TensorCheck

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """With --against, rows of every tensor are read as the engine reads them and compared with the checkpoint's;
a tensor may be off by what its type costs, which is measured on the same rows.

examples:
  phisight verify phi4-int4
  phisight verify phi4-int4 --against path/to/checkpoint"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory, or demo")
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="the checkpoint that the model was made of, or demo: compare tensors"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    directory = model_directory(args.model)
    manifest = Manifest.read(directory)
    size = sum(entry.bytes for entry in manifest.files.values())
    with console.progress("reading", size, "B") as bar:
        manifest.verify(directory, bar.add)
    checks = [] if args.against is None else _compare(directory, manifest, args.against, console)
    wrong = [check for check in checks if not check.ok]
    if args.json:
        document: dict[str, Any] = {"path": str(directory), "files": len(manifest.files), "bytes": size}
        if args.against is not None:
            document["tensors"] = {
                c.name: {"scheme": c.scheme, "error": c.error, "allowed": c.allowed, "ok": c.ok} for c in checks
            }
        console.document(document | {"ok": not wrong})
    else:
        console.line(f"{directory}: {len(manifest.files)} files, {size / 1e6:,.1f} MB, all as exported")
        for line in _table(checks):
            console.line(line)
    if wrong:
        named = ", ".join(f"{c.name} ({c.scheme}) is off by {c.error:.2%}, allowed {c.allowed:.2%}" for c in wrong[:3])
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelDirError(f"{directory} does not hold {args.against}: {named}{rest}: export it again")
    return 0


def _compare(directory: Path, manifest: Manifest, against: str, console: Console) -> list[TensorCheck]:
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.verification import compare_with_checkpoint

        checkpoint = Checkpoint.open(checkpoint_directory(against))
    checks = []
    with console.progress("comparing", len(manifest.tensors), "tensor", scale=False) as bar:
        for check in compare_with_checkpoint(directory, checkpoint):
            checks.append(check)
            bar.add(1)
    return checks


def _table(checks: list[TensorCheck]) -> list[str]:
    """Of each scheme, how many tensors there are and the one that comes nearest to what is allowed."""
    if not checks:
        return []
    lines = [f"{'scheme':<26}{'tensors':>8}{'error':>10}{'allowed':>10}  nearest to it"]
    for scheme in sorted({check.scheme for check in checks}):
        group = [check for check in checks if check.scheme == scheme]
        worst = max(group, key=lambda check: check.error / check.allowed)
        lines.append(f"{scheme:<26}{len(group):>8}{worst.error:>10.3%}{worst.allowed:>10.3%}  {worst.name}")
    if any(check.scaled for check in checks):
        lines.append("the decoder's rows and columns were scaled by its method: factors on them do not count")
    return lines
