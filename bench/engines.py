"""The same INT4 weights through ONNX Runtime and through llama.cpp: how often the answers agree, and how far apart
the distributions are.

    python bench/engines.py [--questions 200]

Exports the built-in model as ONNX INT4 with blocks of 32 and as GGUF Q4_0 (head and embeddings INT8 / Q8_0 in both, so
that every weight is identical), asks both about drawn prices and charts with the same float32 vision encoder, and
prints the share of equal greedy answers and the KL divergence at the answers' positions (reference: ONNX Runtime at
accuracy_level 0).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pictures import questions

import phisight
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import export_gguf, export_onnx, plan_export, plan_gguf
from phisight.export.gguf_plan import GgufOptions
from phisight.export.plan import ExportOptions
from phisight.loading import checkpoint_directory


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    count = parser.parse_args().questions
    checkpoint = Checkpoint.open(checkpoint_directory("demo"))
    with tempfile.TemporaryDirectory() as folder:
        onnx, gguf = Path(folder) / "onnx", Path(folder) / "gguf"
        export_onnx(checkpoint, plan_export(checkpoint, ExportOptions(decoder="int4", vision="f32")), onnx)
        same = (("output.weight", "Q8_0"), ("token_embd.weight", "Q8_0"))
        options = GgufOptions(decoder="Q4_0", onnx_vision="f32", overrides=same)
        export_gguf(checkpoint, plan_gguf(checkpoint, options), gguf)
        reference = phisight.load(onnx, accuracy_level=0)
        models = {
            "llama.cpp Q4_0, repacked": phisight.load(gguf, repack=True),
            "llama.cpp Q4_0": phisight.load(gguf, repack=False),
            "ONNX Runtime INT4, accuracy_level 4": phisight.load(onnx, accuracy_level=4),
        }
        greedy = reference.options(temperature=0, max_tokens=32)
        rows = {name: {"same": 0, "kld": [], "top1": []} for name in models}
        for picture, question, _ in questions(count):
            patches = reference.preprocess(picture)
            prompt = reference.prompt(question, 1)
            answer = [token.token_id for token in reference.generate_tokens(prompt.ids, [patches], greedy)]
            ids = [*prompt.ids, *answer]
            first = len(prompt.ids) - 1 + patches.num_patches - 1  # predicts the first token of the answer
            wanted = log_softmax(reference.score(ids, [patches])[first:])
            for name, model in models.items():
                row = rows[name]
                own = [token.token_id for token in model.generate_tokens(prompt.ids, [patches], greedy)]
                row["same"] += own == answer
                found = log_softmax(model.score(ids, [patches])[first:])
                row["kld"] += (np.exp(wanted) * (wanted - found)).sum(axis=-1).tolist()
                row["top1"] += (wanted.argmax(-1) == found.argmax(-1)).tolist()
    report = [
        {
            "engine": name,
            "same_greedy_answers": row["same"] / count,
            "kld_mean": float(np.mean(row["kld"])),
            "kld_p99": float(np.quantile(row["kld"], 0.99)),
            "same_top1": float(np.mean(row["top1"])),
            "positions": len(row["kld"]),
        }
        for name, row in rows.items()
    ]
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
