"""What calibration should see: pictures, text or both, and what an image token should count where one of text counts 1.

    python bench/calibration.py [--checkpoint demo] [--methods gptq,awq] [--tokens 24576] [--json]

Each row is a decoder in INT4 blocks of 32, quantised by a method that read the source with the weight. Measured is its
mean KL divergence from the checkpoint's own decoder at the positions of answers that no calibration has seen: to
questions about pictures, and to questions without one. The tower is float32 in all of them. The change is against
`both` with a weight of 1, over the same positions, so that its standard error is that of the difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from phisight.backends.ort_session import SessionSettings, integer_products
from phisight.cli.console import Console
from phisight.cli.quantizing import quantize
from phisight.errors import PhisightError
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.export.calibration.held_out import HeldOut, hold_out
from phisight.export.calibration.sources import TEXT_SHARE, read_calibration
from phisight.export.calibration.trial import PlannedWeights, plan_positions
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import plan_export
from phisight.export.mixed import METHODS, TEXT_PARTS
from phisight.export.plan import ExportOptions
from phisight.loading import checkpoint_directory
from phisight.quant.scheme import BlockScheme
from phisight.quant.stored_types import BlockType
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer

WEIGHTS = (0.1, 0.3, 1.0, 3.0)
BASE = ("both", 1.0)
TEXT = "built-in text"
"""As the sources name it."""

Kld = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """Mean KL divergence in nats, and its change against the base, a share, each with its standard error."""

    kld: float
    error: float
    change: float
    change_error: float

    @classmethod
    def of(cls, kld: Kld, base: Kld) -> Figure:
        mean, difference = float(base.mean()), kld - base
        return cls(float(kld.mean()), _error(kld), float(difference.mean()) / mean, _error(difference) / mean)


@dataclass(frozen=True)
class Row:
    """A method, what it read, and what this brought on answers about `pictures` and on those `without` one."""

    method: str
    source: str
    image_token_weight: float
    tokens: int
    image_tokens: int
    pictures: Figure
    without: Figure


@dataclass(frozen=True)
class Data:
    """What is calibrated with, by name, and what is measured on."""

    sources: Mapping[str, CalibrationData]
    pictures: HeldOut
    without: HeldOut

    @classmethod
    def drawn(cls, checkpoint: Checkpoint, tokens: int) -> Data:
        """About `tokens` positions for each source, fewer of the text if it is shorter, and as many to measure on."""
        tokenizer = Tokenizer.from_file(checkpoint.directory / "tokenizer.json")
        pool = read_calibration("demo", checkpoint.directory, checkpoint.config, tokens=4 * tokens).sequences
        text = [each for each in pool if each.source == TEXT]
        questions = [each for each in pool if each.source != TEXT]
        about = CalibrationData(tuple(each for each in questions if each.images))
        plain = CalibrationData(tuple(each for each in questions if not each.images))
        about, pictures = hold_out(about, tokens, tokenizer)
        plain, without = hold_out(plain, tokens, tokenizer)
        drawn = [*about.sequences, *plain.sequences]
        Random(0).shuffle(drawn)
        share = int(TEXT_SHARE * tokens)
        sources = {
            "text": _first(text, tokens),
            "pictures": _first(about.sequences, tokens),
            "both": [*_first(text, share), *_first(drawn, tokens - share)],
        }
        return cls({name: CalibrationData(tuple(each)) for name, each in sources.items()}, pictures, without)


def measure(checkpoint: Checkpoint, data: Data, methods: Sequence[str], folder: Path) -> Iterator[Row]:
    """The rows of each method, when it is through. Raises PhisightError."""
    settings = SessionSettings(threads=choose_threads("auto").count, products=integer_products())
    cells = [(source, weight) for source in data.sources for weight in (WEIGHTS if source != "text" else (1.0,))]
    with tqdm(total=len(methods) * len(cells), unit="row", disable=None) as bar:
        for method in methods:
            found: dict[tuple[str, float], tuple[Kld, Kld]] = {}
            for source, weight in cells:
                bar.set_postfix_str(f"{method}, {source}, {weight:g}")
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    planned = _planned(checkpoint, data.sources[source], method, weight, Path(work) / "work")
                    found[source, weight] = tuple(
                        plan_positions(planned, held_out, folder / name, settings, lambda tokens: None).kld
                        for name, held_out in (("pictures", data.pictures), ("without", data.without))
                    )
                bar.update()
            base = found[BASE]
            for (source, weight), (pictures, without) in found.items():
                sequences = data.sources[source].sequences
                yield Row(
                    *(method, source, weight, data.sources[source].positions),
                    sum(each.image_tokens for each in sequences),
                    *(Figure.of(pictures, base[0]), Figure.of(without, base[1])),
                )


def _planned(checkpoint: Checkpoint, data: CalibrationData, method: str, weight: float, work: Path) -> PlannedWeights:
    plan = plan_export(checkpoint, ExportOptions(decoder="int4", vision="f32", method=method))
    args = argparse.Namespace(image_token_weight=weight, calibration_threads=None)
    quantized = quantize(args, checkpoint, plan, data, work, Console())
    types = {
        name: BlockType(scheme.label, scheme, METHODS["rtn"])
        for name, scheme in plan.schemes.items()
        if isinstance(scheme, BlockScheme) and plan.entries()[name].part in TEXT_PARTS
    }
    return PlannedWeights(checkpoint, types, quantized.weights, quantized.moments)


def _first(sequences: Iterable[CalibrationSequence], tokens: int) -> list[CalibrationSequence]:
    """As many as have `tokens` positions."""
    found: list[CalibrationSequence] = []
    for each in sequences:
        if sum(map(len, found)) >= tokens:
            break
        found.append(each)
    return found


def _error(values: Kld) -> float:
    """Of the mean, taking positions as independent."""
    return float(values.std(ddof=1)) / len(values) ** 0.5


def table(rows: Iterable[Row]) -> Iterator[str]:
    yield f"{'method':<10}{'source':<10}{'weight':>7}{'tokens':>8}{'KLD, pictures':>24}{'change':>15}" + (
        f"{'KLD, no picture':>24}{'change':>15}"
    )
    for row in rows:
        figures = "".join(
            f"{each.kld:>12.5f} +- {each.error:.5f} {each.change:>+8.1%} +- {each.change_error:.1%}"
            for each in (row.pictures, row.without)
        )
        yield f"{row.method:<10}{row.source:<10}{row.image_token_weight:>7g}{row.tokens:>8}{figures}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="a checkpoint, or demo (default)")
    parser.add_argument("--methods", default="gptq,awq", help="of search, awq, gptq, awq+gptq (default: gptq,awq)")
    parser.add_argument("--tokens", type=int, default=24576, help="to calibrate and to measure with (default: 24576)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    args = parser.parse_args()
    try:
        checkpoint = Checkpoint.open(checkpoint_directory(args.checkpoint))
        data = Data.drawn(checkpoint, args.tokens)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            rows = list(measure(checkpoint, data, args.methods.split(","), Path(folder)))
    except KeyboardInterrupt:
        return 130
    except PhisightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = {"pictures": data.pictures.scored, "without": data.without.scored}
    if args.json:
        print(json.dumps({"positions": measured, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(
            f"measured at {measured['pictures']} positions of answers about pictures, {measured['without']} of others"
        )
        print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
