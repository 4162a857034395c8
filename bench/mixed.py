"""Mixed precision by measurement beside llama.cpp's Q4_K_M of the same model: divergence and size.

    python bench/mixed.py [--checkpoint demo] [--questions 50] [--json]

Exports plans of 4.8 bits per weight, as GGUF and as ONNX, by rounding and by GPTQ, and lets `phisight compare` measure
them against a float32 export, with what llama.cpp's own quantiser makes of the checkpoint as a row. The questions are
none that the plans were measured on. ONNX is measured at accuracy_level 0, as its plans were. The last line says
whether the best plan has no more bytes and no higher a mean KL divergence than Q4_K_M.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from phisight.cli.main import main as phisight

SIZE = "4.8bpw"
REFERENCE = ("f32", ["--decoder", "f32"])
PLANS = {
    "gguf mixed rtn": ["--format", "gguf", "--onnx-vision", "none", "--size", SIZE],
    "gguf mixed gptq": ["--format", "gguf", "--onnx-vision", "none", "--size", SIZE, "--method", "gptq"],
    "onnx mixed gptq": ["--vision", "f32", "--accuracy-level", "0", "--size", SIZE, "--method", "gptq"],
}
RIVAL = "Q4_K_M"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="a checkpoint, or demo (default)")
    parser.add_argument("--questions", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--held-out-tokens", type=int, default=24576, help="that plans are measured on")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        _run("export", args.checkpoint, str(root / REFERENCE[0]), *REFERENCE[1])
        for name, options in PLANS.items():
            _run("export", args.checkpoint, str(root / name), *options, "--held-out-tokens", str(args.held_out_tokens))
        variants = [str(root / name) for name in PLANS]
        baseline = ["--checkpoint", args.checkpoint, "--baseline", f"llama.cpp:{RIVAL}"]
        out = ["--out", str(root / "report"), "--n", str(args.questions)]
        _run("compare", str(root / REFERENCE[0]), *variants, *baseline, *out)
        report = json.loads((root / "report/report.json").read_text(encoding="utf-8"))
    rows = [
        {
            "variant": variant["name"],
            "bits_per_weight": variant["bpw"],
            "kld_mean": variant["kld"]["mean"],
            "kld_error": variant["kld"]["error"],
            "same_top1": variant["same_top1"],
        }
        for variant in report["variants"]
        if variant["as_run"]
    ]
    rivals = [variant["name"] for variant in report["variants"] if variant["baseline"]]
    if not rivals:
        sys.exit(f"llama.cpp's {RIVAL} is absent: {report['absent']}")
    rival = next(row for row in rows if row["variant"] == rivals[0])
    best = min((row for row in rows if row["variant"] in PLANS), key=lambda row: row["kld_mean"])
    kept = best["kld_mean"] <= rival["kld_mean"] and best["bits_per_weight"] <= rival["bits_per_weight"]
    if args.json:
        print(json.dumps({"rows": rows, "best": best["variant"], "no_worse": kept}, indent=1))
        return 0 if kept else 1
    for row in rows:
        kld = f"{row['kld_mean']:.5f} +- {row['kld_error']:.5f}"
        print(
            f"{row['variant']:<24}{row['bits_per_weight']:>7.3f} bits/weight  KLD {kld}  top-1 {row['same_top1']:.2%}"
        )
    print(f"{best['variant']} is {'no' if kept else 'NOT no'} larger and no worse than llama.cpp's {RIVAL}")
    return 0 if kept else 1


def _run(*arguments: str) -> None:
    code = phisight(arguments)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
