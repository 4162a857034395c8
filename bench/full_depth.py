"""Seconds of each stage at the 15B model's full depth, without its weights.

    python bench/full_depth.py [--device cpu] [--block-size 32] [--stages prefill,decode] [--runs 3] [--directory DIR]

A model of 40 layers and a tower of 26 is written, in a temporary directory or under --directory, with a piece of random
weights repeated, which takes kernels as long as any: 7.4 GB in INT4. On a GPU its graphs are float16. One process, one
engine; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import get_args

from phisight.backends.ort_session import Device
from phisight.bench import Contender, stages_named
from phisight.compare.memory import peak_memory
from phisight.export.plan import ExportOptions
from phisight.export.probe import write_onnx_probe
from phisight.export.variants import real_model
from phisight.threads import choose_threads, read_threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=get_args(Device), default="cpu")
    parser.add_argument("--block-size", type=int, choices=[32, 64, 128], default=32)
    parser.add_argument("--stages", default="encode_256,encode_1024,encode_3600,prefill,decode", metavar="NAMES")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", default="auto", metavar="N")
    parser.add_argument("--directory", metavar="DIR", help="where there is room (default: the system's temporary one)")
    args = parser.parse_args()
    stages = stages_named(args.stages)
    threads = choose_threads(read_threads(args.threads)).count
    config = real_model()
    options = ExportOptions(
        decoder="int4", block_size=args.block_size, float_type="f32" if args.device == "cpu" else "f16"
    )
    with tempfile.TemporaryDirectory(dir=args.directory, ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        began = perf_counter()
        write_onnx_probe(config, options, directory)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{size / 1e9:.2f} GB written in {perf_counter() - began:.1f} s", flush=True)
        began = perf_counter()
        opened = Contender("ours", "onnxruntime", directory, config, threads, args.device).open()
        print(f"opened on {args.device}, {threads} threads, in {perf_counter() - began:.1f} s", flush=True)
        print("| stage | seconds | spread | units a second |\n|---|---|---|---|")
        for stage in stages:
            seconds = [opened.seconds(stage) for _ in range(args.runs + 1)][1:]
            median = statistics.median(seconds)
            spread = (max(seconds) - min(seconds)) / median
            rate = stage.timed_units / median
            print(f"| {stage.name} | {median:.4f} | {100 * spread:.0f} % | {rate:.1f} |", flush=True)
    if (peak := peak_memory()) is not None:
        print(f"most memory of the process: {peak / 2**20:,.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
