"""Which of two engines runs a chunk of so many positions sooner: ONNX Runtime or OpenVINO, on one exported model.

    python bench/chunk_sizes.py MODEL [--sizes 1,4,8,16,32,64,128,256,512] [--runs 5] [--threads N]

Behind 64 positions. Both engines are open in this process and take turns; medians. `--device openvino+cpu` gives chunks
of LEAST_CHUNK positions or more to OpenVINO (`runtime/backends/paired.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np

from phisight.backends.base import Decoder
from phisight.bench import Contender
from phisight.bench.clock import seconds_of
from phisight.loading import model_directory
from phisight.manifest import Manifest
from phisight.threads import choose_threads, read_threads

BEHIND = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--sizes", default="1,4,8,16,32,64,128,256,512", metavar="N,...")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", default="auto", metavar="N")
    args = parser.parse_args()
    directory = model_directory(args.model)
    manifest = Manifest.read(directory)
    threads = choose_threads(read_threads(args.threads)).count
    common = (directory, manifest.model, threads)
    contenders = (
        Contender("ONNX Runtime", "onnxruntime", *common),
        Contender("OpenVINO", "openvino", *common, group=manifest.least_block),
    )
    decoders = [contender.open().decoder for contender in contenders]
    for decoder in decoders:
        decoder.append([np.arange(BEHIND, dtype=np.int32)])
    print("| positions | ONNX Runtime | OpenVINO | ratio |\n|---|---|---|---|")
    for size in map(int, args.sizes.split(",")):
        times = [[seconds(decoder, size) for decoder in decoders] for _ in range(args.runs + 1)][1:]
        ours, other = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"| {size} | {1000 * ours:.1f} ms | {1000 * other:.1f} ms | {ours / other:.2f} |", flush=True)
    return 0


def seconds(decoder: Decoder, size: int) -> float:
    decoder.truncate(BEHIND)
    return seconds_of(lambda: decoder.append([np.arange(size, dtype=np.int32)]))


if __name__ == "__main__":
    sys.exit(main())
