"""Where the time of each stage goes inside ONNX Runtime: its operators, and the rate of those that multiply.

    python bench/operators.py MODEL [--patches 256,1024,3600] [--prefill 512] [--steps 16] [--threads N]

Times are the engine's own profile of the last of three runs (of all steps, for decoding), on the CPU. A product of
matrices is told apart by its sizes; its rate counts a multiplication and an addition as two operations, those of
attention with every position that it computes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from phisight.backends.ort import OrtDecoder, OrtVisionEncoder
from phisight.backends.ort_session import SessionSettings, import_onnxruntime, integer_products
from phisight.bench import Stage
from phisight.bench.contender import Opened
from phisight.loading import model_directory
from phisight.manifest import Manifest
from phisight.threads import choose_threads, read_threads

RUNS = 3
SHOWN = 0.01
"""Operators that take less than this share are added up."""
PRODUCTS = ("MatMul", "MatMulInteger", "MatMulNBits")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--patches", default="256,1024,3600", metavar="N,...")
    parser.add_argument("--prefill", type=int, default=512, metavar="POSITIONS")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", default="auto", metavar="N")
    args = parser.parse_args()
    threads = choose_threads(read_threads(args.threads)).count
    stages = [Stage(f"encode_{n}", "encode", int(n)) for n in args.patches.split(",") if n]
    stages += [Stage("prefill", "prefill", args.prefill), Stage("decode", "decode", args.steps)]
    directory = model_directory(args.model)
    for stage in stages:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            events = profile(directory, stage, threads, Path(folder))
        print(f"\n{stage.name}: {stage.units} {'steps' if stage.kind == 'decode' else 'at once'}, {threads} threads\n")
        for line in table(events):
            print(line)
    return 0


def profile(directory: Path, stage: Stage, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Events of the engine's profile: operators, within the run or runs that are looked at."""
    config = Manifest.read(directory).model
    ort = import_onnxruntime()
    plain = ort.SessionOptions

    def profiling() -> Any:
        options = plain()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        return options

    ort.SessionOptions = profiling  # what opens sessions has no option for it, and needs none
    try:
        settings = SessionSettings("cpu", threads, None, integer_products())
        width = config.decoder.hidden_size
        encoder = OrtVisionEncoder(directory, settings, width) if stage.kind == "encode" else None
        decoder = OrtDecoder(directory, settings, config.decoder)
    finally:
        ort.SessionOptions = plain
    opened = Opened(config, decoder, encoder)
    for _ in range(RUNS):
        opened.seconds(stage)
    session: Any = (encoder or decoder)._session
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    if stage.kind == "decode":
        begin = runs[-stage.units]
    else:
        begin = runs[-(len(runs) // RUNS)]  # a prefill may be run in several chunks
    return [e for e in events if e.get("cat") == "Node" and e["ts"] >= begin and "op_name" in e.get("args", {})]


def table(events: list[dict[str, Any]]) -> list[str]:
    """Rows for people, the longest first."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event in events:
        name, count = described(event["args"])
        seconds[name] += event["dur"] / 1e6
        calls[name] += 1
        operations[name] += count
    total = seconds.total()
    lines = ["| operator | runs | ms | share | billion operations/s |", "|---|---|---|---|---|"]
    rest = 0.0
    for name, taken in seconds.most_common():
        if taken < SHOWN * total:
            rest += taken
            continue
        rate = f"{operations[name] / taken / 1e9:.0f}" if operations[name] else ""
        lines.append(f"| {name} | {calls[name]} | {1000 * taken:.1f} | {100 * taken / total:.0f} % | {rate} |")
    lines.append(f"| all others | | {1000 * rest:.1f} | {100 * rest / total:.0f} % | |")
    return lines


def described(args: dict[str, Any]) -> tuple[str, int]:
    """An operator's name, with its sizes for a product, and its operations where they are known."""
    name = args["op_name"]
    first = next(iter(args["input_type_shape"][0].values()), []) if args["input_type_shape"] else []
    made = next(iter(args["output_type_shape"][0].values()), []) if args["output_type_shape"] else []
    if name in PRODUCTS and first and made:
        return f"{name} {first[-1]} to {made[-1]}", 2 * int(np.prod(made)) * first[-1]
    if name == "MultiHeadAttention":
        return name, 4 * int(np.prod(made)) * first[1]
    return name, 0


if __name__ == "__main__":
    sys.exit(main())
