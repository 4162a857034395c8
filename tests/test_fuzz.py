"""Damaged files of every kind end in an error of ours or in a result, never in anything else.

The short form runs always, the long one with `pytest -m soak`.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import phisight
from phisight.config import ModelConfig
from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.images import open_image
from phisight.manifest import Manifest
from phisight.tokenizer import Tokenizer

DEMO = Path(phisight.__file__).parent / "demo"
ROUNDS = [pytest.param(60, id="short"), pytest.param(4000, id="long", marks=pytest.mark.soak)]


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, change, drop or repeat a few bytes."""
    kind = rng.integers(4)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 8))):
            changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        return bytes(changed)
    length = int(rng.integers(1, 64))
    if kind == 2:
        return data[:place] + data[place + length :]
    return data[:place] + data[place : place + length] * 2 + data[place + length :]


def _picture(form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures(form: str, rounds: int) -> None:
    rng = np.random.default_rng(1)
    whole = _picture(form)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            try:
                assert open_image(damage(whole, rng), max_pixels=1_000_000).mode == "RGB"
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > rounds // 10


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint/model.safetensors": Checkpoint.open,
    "checkpoint/config.json": ModelConfig.from_checkpoint,
    "checkpoint/generation_config.json": ModelConfig.from_checkpoint,
    "onnx/phisight.json": Manifest.read,
    "onnx/tokenizer.json": lambda directory: Tokenizer.from_file(directory / "tokenizer.json"),
}


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", READERS)
def test_damaged_model_files(name: str, rounds: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    directory = tmp_path / "copy"
    shutil.copytree(DEMO / name.split("/")[0], directory)
    file = directory / name.split("/")[1]
    whole = file.read_bytes()
    # A safetensors file is mostly weights, of which any bits are valid: its header is what can be wrong.
    head = 20_000 if file.suffix == ".safetensors" else len(whole)
    refused = 0
    for _ in range(rounds if head == len(whole) else rounds // 4):
        file.write_bytes(damage(whole[:head], rng) + whole[head:])
        try:
            READERS[name](directory)
        except InputError:
            refused += 1
    assert refused > 0
