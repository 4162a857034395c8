"""llama.cpp's vision encoder against the reference's features, within half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import phisight
from phisight.backends.llamacpp_library import LlamaModel
from phisight.backends.mtmd import MtmdVisionEncoder, patches_to_pixels
from phisight.errors import EngineError
from phisight.naflex import Patches, resize

Exporter = Callable[..., Path]
Synthetic = Callable[[str, int, int, int], Image.Image]

# Relative error of the whole: the projector's GELU is the tanh form in half precision.
HALF = 2e-3


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Path, exported_gguf: Exporter) -> Path:
    return exported_gguf(tiny_checkpoint, decoder="F32", vision="F32")


@pytest.fixture(scope="module")
def text(directory: Path) -> LlamaModel:
    return LlamaModel(directory / "model-f32.gguf", gpu_layers=0, repack=False, verbose=False)


@pytest.fixture(scope="module")
def encoder(directory: Path, text: LlamaModel) -> MtmdVisionEncoder:
    return MtmdVisionEncoder(directory / "mmproj-f32.gguf", text, threads=1)


def relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("size", [(64, 48), (250, 250), (17, 31), (5, 900)])
def test_pixels_come_back_exactly(synthetic_image: Synthetic, size: tuple[int, int]) -> None:
    picture = synthetic_image("RGB", *size, 0)
    np.testing.assert_array_equal(patches_to_pixels(phisight.preprocess(picture)), np.asarray(resize(picture)))


def test_every_level_comes_back() -> None:
    levels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)  # every value three times
    patches = phisight.preprocess(Image.fromarray(levels), 1, 1)
    np.testing.assert_array_equal(patches_to_pixels(patches), levels)


@pytest.mark.parametrize(
    ("case", "image", "limits"),
    [
        ("micro_64x48", ("RGB", 64, 48, 1), (64, 4)),
        ("img_250x250", ("RGB", 250, 250, 0), (3600, 256)),
        ("img_320x240", ("RGB", 320, 240, 3), (3600, 256)),
    ],
)
def test_features(
    golden: Path, encoder: MtmdVisionEncoder, synthetic_image: Synthetic, case: str, image: Any, limits: tuple[int, int]
) -> None:
    patches = phisight.preprocess(synthetic_image(*image), *limits)
    with np.load(golden / f"tiny_golden/{case}.npz") as arrays:
        wanted = arrays["img0/projected"]
    features = encoder.encode(patches)
    assert features.shape == (patches.num_patches, 128) == wanted.shape
    assert features.dtype == np.float32
    assert relative_error(features, wanted) < HALF


def test_a_later_picture_leaves_features_alone(encoder: MtmdVisionEncoder, synthetic_image: Synthetic) -> None:
    first = encoder.encode(phisight.preprocess(synthetic_image("RGB", 64, 48, 0), 64, 4))
    kept = first.copy()
    encoder.encode(phisight.preprocess(synthetic_image("RGB", 64, 48, 3), 64, 4))
    np.testing.assert_array_equal(first, kept)


def test_an_mmproj_that_would_resize(
    directory: Path, text: LlamaModel, tmp_path: Path, synthetic_image: Synthetic
) -> None:
    """Other people's files ask for 256 patches at least; a picture of 252 would be enlarged."""
    path = tmp_path / "mmproj.gguf"
    path.write_bytes((directory / "mmproj-f32.gguf").read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["clip.vision.image_min_pixels"]
    field.parts[field.data[0]][0] = 65536
    del field, reader
    encoder = MtmdVisionEncoder(path, text, threads=1)
    patches = phisight.preprocess(synthetic_image("RGB", 17, 31, 0))
    assert patches.num_patches == 252
    with pytest.raises(EngineError, match="a picture of 252 patches into 2.. tokens, so it would resize it"):
        encoder.encode(patches)
    enough = phisight.preprocess(synthetic_image("RGB", 250, 250, 0))
    assert encoder.encode(enough).shape == (256, 128)


def test_files_that_cannot_be_opened(directory: Path, text: LlamaModel, tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", directory / "model-f32.gguf"):
        with pytest.raises(EngineError, match="llama.cpp cannot open"):
            MtmdVisionEncoder(path, text, threads=1)


def test_closed(directory: Path, text: LlamaModel, synthetic_image: Synthetic) -> None:
    encoder = MtmdVisionEncoder(directory / "mmproj-f32.gguf", text, threads=1)
    encoder.close()
    encoder.close()
    patches: Patches = phisight.preprocess(synthetic_image("RGB", 64, 48, 0), 64, 4)
    with pytest.raises(EngineError, match="was closed"):
        encoder.encode(patches)
