"""How much damping gptq's Hessian wants: the KL divergence that each share of the mean diagonal leaves.

    python bench/damping.py [--checkpoint demo] [--calibration demo] [--tokens 8192] [--shares 0.003,0.01,0.03,0.1,0.3]

Decoder and head in INT4 blocks of 32 by gptq, judged on questions, or halves of texts, that calibration has not seen,
against the checkpoint's own decoder. For SmolLM2 see bench/smollm2.py; it takes --calibration text. The change is that
against the first share, over the same positions, with its standard error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from phisight.backends.ort_session import SessionSettings, integer_products
from phisight.errors import PhisightError
from phisight.export.calibration.held_out import hold_out
from phisight.export.calibration.quantize import LayerQuantizer
from phisight.export.calibration.run import Calibration, CalibrationOptions
from phisight.export.calibration.sources import read_calibration
from phisight.export.calibration.trial import PlannedWeights, plan_positions
from phisight.export.checkpoint import Checkpoint
from phisight.export.mixed import METHODS, onnx_types
from phisight.export.names import EMBEDDINGS
from phisight.export.quantized import QuantizedWeights
from phisight.loading import checkpoint_directory
from phisight.quant.methods.gptq import Gptq
from phisight.quant.stored_types import BlockType
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="a checkpoint, or demo (default)")
    parser.add_argument("--calibration", default="demo", help="as in phisight export (default: demo)")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate with; half as many to measure on")
    parser.add_argument("--shares", default="0.003,0.01,0.03,0.1,0.3", help="of the mean diagonal")
    args = parser.parse_args()
    try:
        measure(Checkpoint.open(checkpoint_directory(args.checkpoint)), args)
    except KeyboardInterrupt:
        return 130
    except PhisightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Prints a line for each share as soon as it is known. Raises PhisightError."""
    threads = choose_threads("auto").count
    settings = SessionSettings(threads=threads, products=integer_products())
    tokens = args.tokens + args.tokens // 2
    data = read_calibration(args.calibration, checkpoint.directory, checkpoint.config, tokens=tokens)
    tokenizer = Tokenizer.from_file(checkpoint.directory / "tokenizer.json")
    data, held_out = hold_out(data, args.tokens // 2, tokenizer)
    types = {name: kinds[0] for name, kinds in onnx_types(checkpoint, METHODS["rtn"], 32, asymmetric=False).items()}
    schemes = {n: kind.scheme for n, kind in types.items() if n != EMBEDDINGS and isinstance(kind, BlockType)}
    print(f"calibrated with {data.positions} tokens, measured at {held_out.scored} positions")
    first = None
    for share in tqdm([float(share) for share in args.shares.split(",")], unit="share", disable=None):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            weights = QuantizedWeights(Path(folder) / "quantized")
            quantizer = LayerQuantizer(checkpoint, schemes, Gptq(damping=share), weights)
            options = CalibrationOptions(hessians=True, threads=threads)
            calibration = Calibration(checkpoint, data, Path(folder) / "work", options)
            calibration.run(quantizer)
            planned = PlannedWeights(checkpoint, types, weights, {})
            kld = plan_positions(planned, held_out, Path(folder) / "streams", settings, lambda positions: None).kld
        first = kld if first is None else first
        change = (kld - first) / first.mean()
        error = float(change.std(ddof=1)) / len(change) ** 0.5
        print(f"damping {share:<7g} mean KLD {kld.mean():.5f}  {change.mean():+.1%} +- {error:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
