"""What prompt lookup brings, on any model: the price of checking a draft, and whole answers with and without.

    python bench/prompt_lookup.py MODEL [MODEL_OF_MORE_LAYERS] [--threads N] [--positions 512] [--cpu-time]

The price is that of a run of several tokens, in times of a run of one. With two models that differ in their number of
layers it is extrapolated to the real model's 40, and so are the answers, by the runs that they take. The weights may be
random (`phisight synth`): answers are scripted. One copies a stretch of the prompt, one with a changed token now and
then; in one half of the tokens follow from the two before them, as in the prompt, so that guesses often miss; one never
repeats anything. Runs alternate; medians. --cpu-time counts the process's own work instead of the time that passes,
which says something on a busy machine too, and reckons the answers from the price: give --threads 1 with it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

import phisight
from phisight.generate import GenerateOptions
from phisight.model import Model
from phisight.prompt_lookup import PromptLookup
from phisight.sampling import Sampler

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
REPEATS = 7
LAYERS = 40
ANSWER = 96
CHANGED = 12
"""One token in so many of a copy is another than in the prompt, by chance."""


def run_seconds(model: Model, positions: int, clock: Callable[[], float]) -> dict[int, float]:
    """Median seconds of a run of so many tokens behind `positions`."""
    decoder = model._decoder._decoder
    rng = np.random.default_rng(0)
    decoder.truncate(0)
    decoder.reserve(positions + max(COUNTS))
    decoder.append([rng.integers(0, 1000, positions, dtype=np.int32)])
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    for repeat in range(REPEATS + 1):
        for count in COUNTS:
            ids = rng.integers(0, 1000, count, dtype=np.int32)
            started = clock()
            decoder.append([ids], "last" if count == 1 else "all")
            if repeat:
                seconds[count].append(clock() - started)
            decoder.truncate(positions)
    model._decoder.forget()
    return {count: statistics.median(values) for count, values in seconds.items()}


@contextmanager
def scripted(script: Sequence[int]) -> Iterator[None]:
    """All samplers draw this script, whatever the logits say, after the usual work."""
    usual, place = Sampler.sample, iter(script)

    def sample(self: Sampler, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        usual(self, logits, allowed)
        return next(place)

    Sampler.sample = sample  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampler.sample = usual  # type: ignore[method-assign]


def answer_seconds(model: Model, prompt: Sequence[int], script: Sequence[int], lookup: bool) -> tuple[float, str]:
    """Seconds of decoding, and how the guesses went."""
    options = GenerateOptions(max_tokens=len(script), prompt_lookup=lookup)
    with scripted(script):
        run = model.generate_tokens(list(prompt), options=options)
        list(run)
    timings = run.timings
    return timings.decode_seconds, f"{timings.accepted_tokens} of {timings.drafted_tokens} guesses right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    prices, layers = [], []
    for name in args.models:
        model = phisight.load(name, threads=args.threads)
        layers.append(model.manifest.model.decoder.num_layers)
        prices.append(run_seconds(model, args.positions, clock))
        print(f"{name}, {layers[-1]} layers")
        _print_prices(prices[-1])
        for kind, (prompt, script) in scripts().items():
            if args.cpu_time:
                _print_reckoned(prices[-1], kind, prompt, script)
            else:
                _print_answers(model, kind, prompt, script)
        del model
    if len(prices) == 2:
        per_layer = {n: (prices[1][n] - prices[0][n]) / (layers[1] - layers[0]) for n in COUNTS}
        print(f"extrapolated to {LAYERS} layers")
        deep = {n: prices[0][n] + per_layer[n] * (LAYERS - layers[0]) for n in COUNTS}
        _print_prices(deep)
        for kind, (prompt, script) in scripts().items():
            _print_reckoned(deep, kind, prompt, script)


def _print_reckoned(seconds: dict[int, float], kind: str, prompt: Sequence[int], script: Sequence[int]) -> None:
    """What the runs of an answer take at this price."""
    found = sum(runs * seconds[count] for count, runs in run_sizes(prompt, script).items())
    print(f"  {kind}: {(len(script) - 1) * seconds[1] / found:.2f} times as fast")


def scripts() -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and answers by kind."""
    rng = np.random.default_rng(1)
    page = rng.choice(900, 400, replace=False).tolist()
    copy = page[100 : 100 + ANSWER]
    changed = [id_ + 900 if rng.random() < 1 / CHANGED else id_ for id_ in copy]
    chance = _chance(rng, 400 + ANSWER)
    return {
        "a copy": (page, copy),
        f"a copy with one in {CHANGED} changed": (page, changed),
        "by chance": (chance[:400], chance[400:]),
        "no repetition": (page, (1000 + rng.choice(900, ANSWER, replace=False)).tolist()),
    }


def run_sizes(prompt: Sequence[int], script: Sequence[int]) -> Counter[int]:
    """How many runs of each number of tokens an answer takes, but for its last token."""
    lookup, sizes, open_ = PromptLookup(prompt), Counter[int](), list[int]()
    for index, token in enumerate(script[:-1]):
        lookup.observe(token)
        if open_ and open_[0] == token:
            del open_[0]
        else:
            open_ = lookup.draft(len(script) - index - 2)
            sizes[1 + len(open_)] += 1
    return sizes


def _chance(rng: np.random.Generator, count: int) -> list[int]:
    """Tokens half of which follow from the two before them."""
    ids = [0, 1]
    while len(ids) < count:
        follows = rng.random() < 0.5
        ids.append((ids[-1] * 31 + ids[-2] * 17) % 20 if follows else int(rng.integers(20)))
    return ids


def _print_prices(seconds: dict[int, float]) -> None:
    for count, value in seconds.items():
        print(f"  a run of {count:>2}: {value * 1e3:8.2f} ms, {value / seconds[1]:5.2f} times one")


def _print_answers(model: Model, kind: str, prompt: Sequence[int], script: Sequence[int]) -> None:
    times: dict[bool, list[float]] = {False: [], True: []}
    told = ""
    for _ in range(3):
        for lookup, seconds in times.items():
            value, told = answer_seconds(model, prompt, script, lookup)
            seconds.append(value)
    without, with_ = (statistics.median(times[lookup]) for lookup in (False, True))
    print(f"  {kind}: {without:.3f} s without, {with_:.3f} s with, {without / with_:.2f} times as fast; {told}")


if __name__ == "__main__":
    main()
