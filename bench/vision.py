"""What each form of the vision tower costs and gains, next to float32.

    python bench/vision.py [CHECKPOINT] [--questions 200] [--grids 16x16,32x32]

Exports the checkpoint (the built-in model's unless one is named) with a float32 decoder and each form of the tower,
and prints for each: bytes, seconds per encoded image, the relative error of the image features, and, for the built-in
model, on how many drawn prices and charts the greedy answer is the same as with the float32 tower.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import questions

import phisight
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_onnx, plan_export
from phisight.export.plan import ExportOptions, VisionType
from phisight.loading import checkpoint_directory
from phisight.manifest import Manifest
from phisight.naflex import Patches

FORMS: tuple[VisionType, ...] = ("f32", "f16", "int8", "w8a8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--grids", default="8x8,16x16")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(checkpoint_directory(arguments.checkpoint))
    rng = np.random.default_rng(0)
    asked = questions(arguments.questions)
    pictures = [picture for picture, _, _ in asked]
    grids = [tuple(map(int, text.split("x"))) for text in arguments.grids.split(",")]
    noise = {grid: rng.uniform(-1, 1, (grid[0] * grid[1], 768)).astype(np.float32) for grid in grids}
    rows: list[dict[str, Any]] = []
    exact: list[NDArray[np.float32]] = []
    wanted: list[str] = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / form
            decoder = "f32" if arguments.checkpoint == "demo" else "int4"
            export_onnx(checkpoint, plan_export(checkpoint, ExportOptions(decoder=decoder, vision=form)), out)
            model = phisight.load(out)
            row: dict[str, Any] = {"vision": form, "bytes": Manifest.read(out).files["vision.onnx.data"].bytes}
            encoder: Any = model._encoder.engine
            for (rows_, columns), pixels in noise.items():
                patches = Patches(pixels, (rows_, columns), (16 * columns, 16 * rows_))
                encoder.encode(patches)
                times = []
                for _ in range(5):
                    started = time.perf_counter()
                    encoder.encode(patches)
                    times.append(time.perf_counter() - started)
                row[f"seconds_{rows_}x{columns}"] = round(sorted(times)[2], 5)
            features = [encoder.encode(model.preprocess(picture)) for picture in pictures]
            exact = exact or features
            error = sum(float(np.square(a - b).sum()) for a, b in zip(features, exact, strict=True))
            row["relative_error"] = (error / sum(float(np.square(b).sum()) for b in exact)) ** 0.5
            if arguments.checkpoint == "demo":
                options = model.options(temperature=0, max_tokens=16)
                answers = [model.generate(question, [picture], options=options).text for picture, question, _ in asked]
                wanted = wanted or answers
                row["same_answers"] = sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)
            del model
        rows.append(row)
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
