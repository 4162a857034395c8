"""What an export takes: weights a second, and the most anonymous memory of the process and its children (Linux).

python bench/export.py CHECKPOINT OUT [--kills N] [-- options of phisight export]

With --kills the export is made once more in OUT-killed, killed N times at random moments and run again each time; what
it comes to must have the same manifest, which holds the SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from phisight.manifest import FILE_NAME, Manifest

STEP = 0.2
"""Seconds between two looks at the memory."""
LATEST = 0.8
"""The last kill's moment at most, as a share of the uninterrupted run: a warm page cache makes the next one faster."""


@dataclass(frozen=True)
class Run:
    """Seconds, most bytes of anonymous memory, whether the run came to its end, and whether it was killed."""

    seconds: float
    memory: int
    done: bool
    killed: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("options", nargs="*")
    args = parser.parse_intermixed_args()
    whole = _run(args.checkpoint, args.out, args.options)
    if not whole.done:
        return 1
    manifest = Manifest.read(args.out)
    weights = sum(entry.weights for entry in manifest.tensors.values())
    size = sum(entry.bytes for entry in manifest.files.values())
    rate = weights / whole.seconds / 1e6
    print(
        f"{weights / 1e6:,.0f} M weights -> {size / 1e9:.2f} GB in {whole.seconds:.1f} s: {rate:.1f} M weights/s, "
        f"at most {whole.memory / 2**20:,.0f} MiB of anonymous memory",
        flush=True,
    )
    if args.kills:
        again = args.out.with_name(args.out.name + "-killed")
        rng = random.Random(0)
        moments = sorted(rng.uniform(0, LATEST * whole.seconds) for _ in range(args.kills))
        for before, moment in zip([0.0, *moments], moments, strict=False):
            if not _run(args.checkpoint, again, args.options, kill_after=moment - before).killed:
                print(f"{again} ended by itself before the kill at {moment - before:.1f} s")
                return 1
            print(f"killed after {moment - before:.1f} s", flush=True)
        rest = _run(args.checkpoint, again, args.options)
        same = rest.done and (again / FILE_NAME).read_bytes() == (args.out / FILE_NAME).read_bytes()
        print(f"the rest took {rest.seconds:.1f} s; {'the same bytes' if same else 'NOT THE SAME BYTES'}")
        return 0 if same else 1
    return 0


def _run(checkpoint: Path, out: Path, options: list[str], kill_after: float = float("inf")) -> Run:
    command = [sys.executable, "-m", "phisight.cli.main", "export", str(checkpoint), str(out), *options]
    began, most, killed = time.perf_counter(), 0, False
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            most = max(most, _anonymous(watched))
            if time.perf_counter() - began > kill_after and not killed:
                process.kill()
                killed = True
            time.sleep(STEP)
    return Run(time.perf_counter() - began, most, process.returncode == 0, killed)


def _anonymous(process: psutil.Process) -> int:
    """Resident bytes that are not mapped files, with those of all children."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            memory = each.memory_info()
            total += memory.rss - memory.shared
    except psutil.NoSuchProcess:
        pass
    return total


if __name__ == "__main__":
    sys.exit(main())
