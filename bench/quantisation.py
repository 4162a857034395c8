"""All quantisations of a checkpoint beside each other, and the tables of docs/quantisation.md.

    python bench/quantisation.py OUT [--checkpoint demo] [--n 20] [--speed] [--write docs/quantisation.md]

Exports the checkpoint in float32 and in every form of RECIPES into OUT, makes an importance matrix, runs `phisight
compare` with the baselines, and prints Markdown. What is there already is not made again: after a break, or with
another form, run it again. With --write the tables also take the place of those between the page's two markers. With
--speed, for a machine without other work, tokens a second and peak memory are columns too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phisight.cli.main import main as phisight

RECIPES = {
    "int8": "--decoder int8",
    "int8-exact-tower": "--decoder int8 --vision f32",
    "int4": "--decoder int4",
    "int4-search": "--decoder int4 --method search",
    "int4-awq": "--decoder int4 --method awq",
    "int4-gptq": "--decoder int4 --method gptq",
    "int4-awq-gptq": "--decoder int4 --method awq+gptq",
    "int4-asymmetric": "--decoder int4 --asymmetric",
    "mixed-4.8": "--size 4.8bpw --method gptq",
    "q4_0-gptq": "--format gguf --decoder q4_0 --method gptq",
    "gguf-mixed-4.8": "--format gguf --onnx-vision none --size 4.8bpw --method gptq",
}
"""Name of the directory -> options of `phisight export`."""
BASELINES = (
    "llama.cpp:Q4_0",
    "llama.cpp:Q4_K_M",
    "llama.cpp:Q4_K_M+{matrix}",
    "llama.cpp:Q8_0",
    "onnxruntime:int8",
)
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def run(*arguments: str | Path) -> None:
    """A phisight command. Exits if it fails."""
    print("phisight", *arguments, file=sys.stderr, flush=True)
    if code := phisight([str(argument) for argument in arguments]):
        sys.exit(code)


def make(out: Path, checkpoint: str) -> list[Path]:
    """Every form that OUT lacks; the reference comes first."""
    for name, options in {"f32": "--decoder f32", **RECIPES}.items():
        if not (out / name).exists():
            run("export", checkpoint, out / name, *options.split())
    if not (out / "imatrix.gguf").exists():
        run("imatrix", checkpoint, out / "imatrix.gguf")
    return [out / name for name in ("f32", *RECIPES)]


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    data, reference = report["data"], report["reference"]
    yield (
        f"{data['passages']} questions ({', '.join(f'{count} {task}' for task, count in data['tasks'].items())}), "
        f"{data['positions']} positions of the float32 export's own answers, which "
        f"takes {reference['bytes'] / 1e6:.1f} MB and is right on {percent(reference['score'])}."
    )
    yield ""
    columns = ["variant", "level", "bits/weight", "MB", "mean KLD", "99 %", "same top-1", "right"]
    timed = any(each["speed"] for each in report["variants"])
    columns += ["decode, tokens/s", "peak, MB"] if timed else []
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for each in report["variants"]:
        name = each["name"].split(" (accuracy_level")[0]
        level = "-" if each["accuracy_level"] is None else str(each["accuracy_level"])
        cells = [
            *(name, level, f"{each['bpw']:.2f}", f"{each['bytes'] / 1e6:.1f}"),
            f"{each['kld']['mean']:.2e} ± {each['kld']['error']:.0e}",
            *(f"{each['kld']['p99']:.2e}", percent(each["same_top1"]), percent(each["score"])),
        ]
        if timed:
            decode, peak = each["speed"]["decode_tokens_per_second"], each["speed"]["peak_bytes"]
            cells += [
                "-" if decode is None else f"{decode['median']:.0f} ({decode['p25']:.0f}-{decode['p75']:.0f})",
                "-" if peak is None else f"{peak / 1e6:.0f}",
            ]
        yield "| " + " | ".join(cells) + " |"
    for row in report["absent"]:
        yield f"| {row['name']} | absent: {row['reason']} |" + " |" * (len(columns) - 2)
    shown = [each for each in report["variants"] if each["as_run"]]
    yield ""
    yield "Right answers by task:"
    yield ""
    yield "| variant | " + " | ".join(data["tasks"]) + " |"
    yield "|---" * (len(data["tasks"]) + 1) + "|"
    for each in [reference, *shown]:
        shares = (percent(score["right"] / score["n"]) for score in each["tasks"].values())
        yield f"| {each['name']} | " + " | ".join(shares) + " |"
    yield ""
    yield "Mean KL divergence that one stage alone brings:"
    yield ""
    stages = list(shown[0]["stages"])
    yield "| stage | " + " | ".join(each["name"] for each in shown) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    for stage in stages:
        values = (each["stages"].get(stage) for each in shown)
        yield f"| {stage} | " + " | ".join("-" if value is None else f"{value:.1e}" for value in values) + " |"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def write(page: Path, text: str) -> None:
    """Put the tables between the markers of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        sys.exit(f"{page} has no {BEGIN} with {END} behind it: put them where the tables belong")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--n", type=int, default=20, help="questions of each task")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--speed", action="store_true", help="time each variant, in a process of its own")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the two markers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    reference, *variants = make(args.out, args.checkpoint)
    compared = args.out / "compared"
    asked = [each.format(matrix=args.out / "imatrix.gguf") for each in BASELINES]
    baselines = [word for each in asked for word in ("--baseline", each)]
    run(
        *("compare", reference, *variants, *baselines, "--checkpoint", args.checkpoint, "--out", compared),
        *("--n", str(args.n), "--threads", args.threads, "--fine-stages", *["--speed"] * args.speed),
    )
    report = json.loads((compared / "report.json").read_text(encoding="utf-8"))
    text = "\n".join(["", *tables(report), ""])
    print(text)
    if args.write is not None:
        write(args.write, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
