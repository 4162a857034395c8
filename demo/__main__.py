"""Train the demo model: python -m phisight.training RUN [--smoke]."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from phisight.errors import PhisightError
from phisight.training.architecture import first_weights
from phisight.training.checkpoint import adopt, write_checkpoint
from phisight.training.recipe import CONTINUED, FROM_NOISE, Stage, smoke
from phisight.training.run import STATE, TOKENIZER, Run
from phisight.training.vocabulary import tokenizer_json

EXAMPLES = """examples:
  python -m phisight.training run                 train from noise, hours on two cores; the same command resumes
  python -m phisight.training run --minutes 90    stop and save after that time
  python -m phisight.training run --start runtime/demo/checkpoint
                                                  train these weights further
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m phisight.training",
        description="Train the demo model and write its checkpoint to RUN/checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="directory of the run: state, log and checkpoint; resumed if it exists")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of all data (default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="one thread each (default: 2)")
    parser.add_argument("--minutes", type=float, help="save and stop after this time")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with this checkpoint's weights")
    parser.add_argument("--smoke", action="store_true", help="every stage in a few steps, to see that it runs")
    given = parser.parse_args(arguments)
    recipe: Sequence[Stage] = CONTINUED if given.start else FROM_NOISE
    if given.smoke:
        recipe = smoke(recipe)
    stop_at = time.time() + 60 * given.minutes if given.minutes else None
    try:
        if (given.run / STATE).exists():
            run = Run.resume(given.run, given.processes)
        else:
            tokenizer = json.dumps(tokenizer_json(), ensure_ascii=False)
            weights = first_weights(given.seed)
            if given.start:
                adopt(weights, given.start, tokenizer)
            run = Run.start(given.run, given.seed, weights, tokenizer, given.processes)
        finished = run.train(recipe, stop_at)
        if finished:
            tokenizer = (given.run / TOKENIZER).read_text(encoding="utf-8")
            write_checkpoint(run.weights(), tokenizer, given.run / "checkpoint")
    except PhisightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"{given.run / 'checkpoint'} is written" if finished else "time is up; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
