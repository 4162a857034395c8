"""Trained weights as a checkpoint directory in the official layout, and weights taken from such a directory."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phisight.export.directory import new_directory
from phisight.export.documents import config_document, generation_document, preprocessor_document
from phisight.export.names import EMBEDDINGS, HEAD, TensorSpec, expected_tensors
from phisight.training.architecture import LABEL_HEAD, MODEL

__all__ = ["adopt", "read_weights", "write_checkpoint"]

WEIGHTS = "model.safetensors"


def write_checkpoint(weights: dict[str, Tensor], tokenizer: str, out: Path) -> None:
    """bfloat16 weights, with small random numbers for what the official model has and never uses."""
    specs = expected_tensors(MODEL)
    tensors = {name: weights[name] if name in weights else _unused(spec) for name, spec in specs.items()}
    assert MODEL.images is not None
    documents = {
        "config.json": config_document(MODEL),
        "generation_config.json": generation_document(MODEL.generation) | {"do_sample": False},
        "preprocessor_config.json": preprocessor_document(MODEL.images),
    }
    with new_directory(out) as work:
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, work / WEIGHTS)
        for name, document in documents.items():
            (work / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8", newline="\n")
        (work / "tokenizer.json").write_text(tokenizer, encoding="utf-8", newline="\n")
        template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        (work / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights in float32."""
    return {name: tensor.float() for name, tensor in load_file(checkpoint / WEIGHTS).items()}


def _unused(spec: TensorSpec) -> Tensor:
    generator = torch.Generator().manual_seed(spec.size)
    if "norm" in spec.name:
        return torch.full(spec.shape, float(spec.name.endswith("weight")))
    return torch.randn(spec.shape, generator=generator) * 0.02


def adopt(weights: dict[str, Tensor], checkpoint: Path, tokenizer: str) -> None:
    """Replace first weights by those of a trained checkpoint of this shape, the rows of tokens by the tokens' text.

    A token that the checkpoint does not know gets the mean of the tokens that its text has there.
    """
    found = read_weights(checkpoint)
    for name, tensor in weights.items():
        if name not in (EMBEDDINGS, HEAD, *LABEL_HEAD):
            tensor.copy_(found[name])
    theirs = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ours = tokenizers.Tokenizer.from_str(tokenizer)
    for token, index in ours.get_vocab().items():
        known = theirs.token_to_id(token)
        rows = [known] if known is not None else theirs.encode(ours.decode([index]), add_special_tokens=False).ids
        for name in (EMBEDDINGS, HEAD):
            if rows:
                weights[name][index] = found[name][rows].mean(0)
