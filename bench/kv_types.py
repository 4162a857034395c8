"""What an INT8 KV cache takes and how fast it is beside the float one, on a directory exported with --kv int8.

    python bench/kv_types.py MODEL [--threads N] [--positions 512 4096]

A token and a chunk of 256 are run behind so many positions, whose contents do not matter for the time; runs of both
types alternate. The best of each counts, and the median is told. Memory is that of the cache once all of it is written.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from phisight.backends.ort import OrtDecoder
from phisight.backends.ort_session import SessionSettings, integer_products
from phisight.loading import model_directory
from phisight.loading_checks import decoder_graph
from phisight.manifest import Manifest

CHUNK = 256
REPEATS = {1: 10, CHUNK: 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 4096])
    args = parser.parse_args()
    directory = model_directory(args.model)
    manifest = Manifest.read(directory)
    settings = SessionSettings(threads=args.threads, products=integer_products())
    config = manifest.model.decoder
    decoders = {
        kind: OrtDecoder(directory, settings, config, decoder_graph(directory, manifest, kind))
        for kind in (None, "int8")
    }
    places = sorted({min(positions, config.context_length - CHUNK) for positions in args.positions})
    capacity = places[-1] + CHUNK
    for kind, decoder in decoders.items():
        decoder.reserve(capacity)
        for pair in decoder._cache:
            for memory in pair:
                memory.numpy()[...] = 1
        held = sum(memory.numpy().nbytes for pair in decoder._cache for memory in pair)
        print(f"{kind or 'own'}: {decoder.kv_bytes_per_token} bytes a position, {held / 2**20:.0f} MiB of {capacity}")
    rng = np.random.default_rng(0)
    for positions in places:
        for count, repeats in REPEATS.items():
            seconds: dict[str | None, list[float]] = {kind: [] for kind in decoders}
            for _ in range(repeats):
                for kind, decoder in decoders.items():
                    decoder._length = positions
                    ids = rng.integers(0, config.vocab_size, count, dtype=np.int32)
                    started = time.perf_counter()
                    decoder.append([ids])
                    seconds[kind].append(time.perf_counter() - started)
            told = (
                f"{kind or 'own'} {min(found) * 1e3:.1f} ms (median {statistics.median(found) * 1e3:.1f})"
                for kind, found in seconds.items()
            )
            print(f"behind {positions}, {count} at once: " + ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
