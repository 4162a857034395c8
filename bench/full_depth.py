"""Seconds of each stage at the 15B model's full depth, without its weights: one engine, in one process.

    python bench/full_depth.py [--engine onnxruntime] [--device cpu] [--block-size 32] [--stages prefill,decode]
                               [--runs 3] [--threads N] [--directory DIR]

A model of 40 layers and a tower of 26 is written, in a temporary directory or under --directory, with a piece of random
weights repeated, which takes kernels as long as any: 9 GB in INT4. On a GPU its graphs are float16. llama.cpp gets Q4_0
with the head and embeddings in Q8_0, and no tower. Medians. Nothing is said of memory: ONNX Runtime keeps equal weights
once, and those of all layers are equal here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import get_args

from phisight.backends.ort_session import Device
from phisight.bench import Contender, stages_named
from phisight.export.gguf_plan import GgufOptions
from phisight.export.plan import ExportOptions
from phisight.export.probe import write_gguf_probe, write_onnx_probe
from phisight.export.variants import real_model
from phisight.threads import choose_threads, read_threads

ENGINES = ("onnxruntime", "openvino", "openvino+cpu", "llama.cpp")
SAME_HEAD = (("output.weight", "Q8_0"), ("token_embd.weight", "Q8_0"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime")
    parser.add_argument("--device", choices=get_args(Device), default="cpu", help="of ONNX Runtime")
    parser.add_argument("--block-size", type=int, choices=[32, 64, 128], default=32)
    parser.add_argument("--stages", default="encode_256,encode_1024,encode_3600,prefill,decode", metavar="NAMES")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", default="auto", metavar="N")
    parser.add_argument("--directory", metavar="DIR", help="where there is room (default: the system's temporary one)")
    args = parser.parse_args()
    stages = stages_named(args.stages)
    threads = choose_threads(read_threads(args.threads)).count
    config = real_model()
    if all(stage.kind != "encode" for stage in stages) or args.engine in ("llama.cpp", "openvino"):
        config = replace(config, vision=None, images=None)
        stages = tuple(stage for stage in stages if stage.kind != "encode")
    with tempfile.TemporaryDirectory(dir=args.directory, ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        began = perf_counter()
        if args.engine == "llama.cpp":
            write_gguf_probe(config, GgufOptions(decoder="Q4_0", overrides=SAME_HEAD), directory)
        else:
            kind = "f32" if args.device == "cpu" else "f16"
            options = ExportOptions(decoder="int4", block_size=args.block_size, float_type=kind)
            write_onnx_probe(config, options, directory)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{size / 1e9:.2f} GB written in {perf_counter() - began:.1f} s", flush=True)
        began = perf_counter()
        place = (directory, config, threads, args.device)
        opened = Contender(args.engine, args.engine, *place, group=args.block_size).open()
        print(f"{args.engine}, {args.device}, {threads} threads, opened in {perf_counter() - began:.0f} s", flush=True)
        print("| stage | seconds | spread | units a second |\n|---|---|---|---|")
        for stage in stages:
            seconds = [opened.seconds(stage) for _ in range(args.runs + 1)][1:]
            median = statistics.median(seconds)
            spread = (max(seconds) - min(seconds)) / median
            rate = stage.timed_units / median
            print(f"| {stage.name} | {median:.4f} | {100 * spread:.0f} % | {rate:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
