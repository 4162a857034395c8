"""What a schema costs: the mask of one token, and drawing from what it allows, at the size of the real vocabulary.

    python bench/constraint.py TOKENIZER.json [--repeat N]

Follows a JSON text token by token, as an answer would go, with random logits. Times are CPU times; no model is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import numpy as np

from phisight.constraint import Constraint
from phisight.constraint_llguidance import Compiler
from phisight.options import GenerateOptions
from phisight.sampling import Sampler
from phisight.tokenizer import Tokenizer

TEXT = (
    '{"shop": "Corner Bakery", "items": [{"name": "rye bread, sliced", "price": 4.2}, {"name": "Café crème", '
    '"price": 3.75}], "note": "Paid in cash; the customer asked for a copy of the receipt by mail.", "paid": true}'
)
ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "price": {"type": "number"}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "shop": {"type": "string"},
        "items": {"type": "array", "items": ITEM | {"required": ["name", "price"], "additionalProperties": False}},
        "note": {"type": "string"},
        "paid": {"type": "boolean"},
    },
    "required": ["shop", "items", "note", "paid"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    stop = tokenizer.id_of("<|im_end|>")
    assert stop is not None
    started = process_time()
    compiler = Compiler(tokenizer, frozenset({stop}))
    print(f"{tokenizer.vocab_size} tokens; once for a model: {process_time() - started:.2f} s")
    ids = tokenizer.encode(TEXT, parse_special=False)
    logits = np.random.default_rng(0).normal(0, 3, (8, tokenizer.vocab_size)).astype(np.float32)
    for name, constraint in (("schema", Constraint.json_schema(SCHEMA)), ("any object", Constraint.json_object())):
        sampler = Sampler(GenerateOptions(seed=0), tokenizer.vocab_size)
        compiled, masks, drawn, free = [], [], [], []
        for _ in range(args.repeat):
            started = process_time()
            matcher = compiler.compile(constraint)
            compiled.append(process_time() - started)
            for place, token_id in enumerate(ids):
                row = logits[place % len(logits)]
                marks = [process_time()]
                mask = matcher.allowed()
                marks.append(process_time())
                sampler.sample(row, mask)
                marks.append(process_time())
                sampler.sample(row)
                marks.append(process_time())
                assert mask[token_id]
                matcher.advance(token_id)
                masks.append(marks[1] - marks[0])
                drawn.append(marks[2] - marks[1])
                free.append(marks[3] - marks[2])
        print(
            f"{name}: compiled in {_ms(np.median(compiled))}; a token: mask {_ms(np.median(masks))} "
            f"(mean {_ms(np.mean(masks))}, largest {_ms(max(masks))}), drawing {_ms(np.median(drawn))} "
            f"(without a mask {_ms(np.median(free))}); {len(ids)} tokens, {args.repeat} times"
        )


def _ms(seconds: float | np.floating) -> str:
    return f"{1e3 * float(seconds):.2f} ms"


if __name__ == "__main__":
    main()
