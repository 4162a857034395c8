"""What calibrating and quantising costs at the real model's widths: anonymous memory and time, layer by layer.

    python bench/real_widths.py DIR [--methods gptq,awq] [--layers 2] [--tokens 2048] [--threads N] [--json]

Makes in DIR a synthetic checkpoint of the real widths (hidden 5120, feed-forward 17920; 3.6 GB with two layers, see
`phisight synth --help`) and quantises its layers to INT4 in blocks of 32, as `phisight export --method` does, each
method in a process of its own. Weights and activations have no meaning; what they cost does not depend on it.

The peak is that of RssAnon in /proc/self/status (Linux), every 50 ms: memory that no file backs. Weights and
activations lie in files, whose pages the system takes back when it needs them. The two passes of a layer grow with the
tokens, quantising does not: the extrapolation to 40 layers takes the passes at 24576 tokens, the default. Seconds are
those of all processors together, which others' work on the machine hardly changes: over the cores, the least time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phisight.errors import PhisightError
from phisight.export.calibration.fold import AwqQuantizer
from phisight.export.calibration.quantize import LayerQuantizer
from phisight.export.calibration.run import Calibration, CalibrationOptions, LayerInputs
from phisight.export.calibration.sources import DEFAULT_TOKENS, read_calibration
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import plan_export
from phisight.export.mixed import METHODS
from phisight.export.names import HEAD
from phisight.export.plan import HESSIAN_METHODS, SCALING_METHODS, ExportOptions
from phisight.export.quantized import QuantizedWeights
from phisight.export.synth import synthesize
from phisight.threads import choose_threads

LAYERS = 40
"""Of the real decoder."""


@dataclass
class Watch:
    """Follows this process's anonymous memory, in bytes, until `stop`."""

    peak: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def taken(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, 0
        return peak

    def _follow(self) -> None:
        while not self._over.wait(0.05):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, now)


def measure(path: Path, method: str, tokens: int, threads: int) -> dict[str, Any]:
    """Seconds and bytes of each layer. Raises PhisightError."""
    checkpoint = Checkpoint.open(path)
    plan = plan_export(checkpoint, ExportOptions(decoder="int4", vision="f32", method=method))
    schemes = {name: scheme for name, scheme in plan.schemes.items() if name != HEAD}
    data = read_calibration("text", path, checkpoint.config, tokens=tokens)
    watch, stages = Watch(), []
    watch.start()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        weights = QuantizedWeights(Path(folder) / "quantized")
        quantizer: LayerQuantizer | AwqQuantizer
        if method in SCALING_METHODS:
            quantizer = AwqQuantizer(checkpoint, schemes, weights, METHODS[method])
        else:
            quantizer = LayerQuantizer(checkpoint, schemes, METHODS[method], weights)
        ended = time.process_time()

        def timed(layer: LayerInputs) -> None:
            nonlocal ended
            began, passing = time.process_time(), watch.taken()
            quantizer(layer)
            passes, ended = began - ended, time.process_time()
            kept = {"passes_s": passes, "quantising_s": ended - began}
            stages.append({**kept, "passes_bytes": passing, "quantising_bytes": watch.taken()})
            print(f"{method} stage {layer.index}: {stages[-1]}", file=sys.stderr, flush=True)

        options = CalibrationOptions(hessians=method in HESSIAN_METHODS, threads=threads)
        Calibration(checkpoint, data, Path(folder) / "work", options).run(timed)
    watch.stop()
    layers = stages[:-1]  # behind them comes the head, which is left out
    # Between two layers lie the second pass of one and the first of the next: both passes of a layer.
    passes = sum(each["passes_s"] for each in layers[1:]) / len(layers[1:])
    quantising = sum(each["quantising_s"] for each in layers) / len(layers)
    whole = LAYERS * (passes * DEFAULT_TOKENS / data.positions + quantising)
    return {
        "method": method,
        "tokens": data.positions,
        "threads": threads,
        "peak_bytes": max(max(each["passes_bytes"], each["quantising_bytes"]) for each in layers),
        "layer_passes_s": passes,
        "layer_quantising_s": quantising,
        "all_layers_h": whole / 3600,
        "layers": layers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the checkpoint is made and kept")
    parser.add_argument("--methods", default="gptq,awq", help="of search, awq, gptq, awq+gptq (default: gptq,awq)")
    parser.add_argument("--layers", type=int, default=2, help="two or more (default: 2)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the built-in text (default: 2048)")
    parser.add_argument("--threads", type=int, help="of the engine (default: what suits the machine)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if args.layers < 2 or not set(methods) <= set(METHODS) - {"rtn"}:
        parser.error("wanted two layers or more, and methods that calibrate")
    path = args.folder / f"wide-{args.layers}"
    threads = args.threads or choose_threads("auto").count
    try:
        args.folder.mkdir(exist_ok=True)
        if not path.exists():
            synthesize(path, layers=args.layers, width="real")
        if len(methods) == 1:
            found = [measure(path, methods[0], args.tokens, threads)]
        else:  # what one method frees, the allocator may keep: it would be counted with the next
            found = [_in_a_process(args, method, threads) for method in methods]
    except KeyboardInterrupt:
        return 130
    except PhisightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("| method | tokens | threads | peak, GiB | passes, s/layer | quantising, s/layer | 40 layers, h |")
    print("|---|---|---|---|---|---|---|")
    for each in found:
        print(
            f"| {each['method']} | {each['tokens']} | {each['threads']} | {each['peak_bytes'] / 2**30:.2f} | "
            f"{each['layer_passes_s']:.0f} | {each['layer_quantising_s']:.0f} | "
            f"{each['all_layers_h']:.1f} |"
        )
    return 0


def _in_a_process(args: argparse.Namespace, method: str, threads: int) -> dict[str, Any]:
    options = ["--methods", method, "--layers", str(args.layers), "--tokens", str(args.tokens)]
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        str(args.folder),
        *options,
        "--threads",
        str(threads),
        "--json",
    ]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if run.returncode:
        raise PhisightError(f"measuring {method} ended with {run.returncode}")
    (found,) = json.loads(run.stdout)
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
