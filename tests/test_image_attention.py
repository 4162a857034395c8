"""Image attention on both engines, causal and bidirectional, against PyTorch with its mask written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import phisight
from phisight.backends.llamacpp_library import GGML_TYPES
from phisight.cached_decoder import CachedDecoder
from phisight.chunks import ImageAttention
from phisight.errors import Cancelled, EngineError
from phisight.loading import checkpoint_directory
from phisight.model import Model
from phisight.naflex import Patches
from phisight.sequence import IMAGE_SLOT, ImageFeatures, InputSequence, splice

torch = pytest.importorskip("torch", reason="PyTorch, the extra [train], is not installed")
from phisight.training.checkpoint import read_weights  # noqa: E402
from phisight.training.forward import decode, embed, encode, logits, project  # noqa: E402

Exporter = Callable[..., Path]

DEMO = checkpoint_directory("demo")
PICTURES = Path(phisight.__file__).parent / "demo/pictures"
ENGINES = ("onnx", "gguf")
GGML_TYPE_F32 = 0
TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def models(exported: Exporter, exported_gguf: Exporter) -> Iterator[dict[tuple[str, ImageAttention], Model]]:
    """By engine and mode, in float32, and so llama.cpp's KV cache too. The ONNX model is one export, opened twice."""
    directory = exported(DEMO, decoder="f32", image_attention="bidirectional")
    file = exported_gguf(DEMO, decoder="F32", vision="F32") / "model-f32.gguf"
    opened: dict[tuple[str, ImageAttention], Model] = {}
    for mode in ("causal", "bidirectional"):
        opened["onnx", mode] = phisight.load(directory, threads=1, image_attention=mode)
        mmproj = file.with_name("mmproj-f32.gguf")
        opened["gguf", mode] = phisight.load(file, mmproj=mmproj, threads=1, image_attention=mode, repack=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GGML_TYPES, "f16", GGML_TYPE_F32)
        yield opened


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


class Oracle:
    """The architecture in PyTorch, which knows nothing of caches and chunks, with its mask written out."""

    def __init__(self) -> None:
        self.weights = read_weights(DEMO)
        self.config = phisight.load("demo", threads=1).manifest.model

    def features(self, patches: Patches) -> ImageFeatures:
        assert self.config.vision is not None
        with torch.inference_mode():
            encoded = encode(self.weights, self.config.vision, torch.tensor(patches.pixel_values)[None], patches.grid)
            return ImageFeatures(patches.digest, project(self.weights, encoded)[0].numpy())

    def logits(self, ids: Sequence[int], images: Sequence[ImageFeatures], mode: ImageAttention) -> NDArray[np.float32]:
        """Logits (positions, vocab) of ids with -200 where an image goes."""
        parts, number = [], 0
        owner: list[int] = []  # of each position: the number of its image, or less than 0 and unlike any other
        for id_ in ids:
            if id_ == IMAGE_SLOT:
                parts.append(torch.tensor(images[number].features))
                owner += [number] * images[number].num_patches
                number += 1
            else:
                parts.append(embed(self.weights, torch.tensor([id_])))
                owner.append(-1 - len(owner))
        places = np.arange(len(owner))
        seen = places[:, None] >= places
        if mode == "bidirectional":
            seen |= np.array(owner)[:, None] == owner
        mask = torch.zeros(seen.shape).masked_fill_(~torch.tensor(seen), -math.inf)[None, None]
        with torch.inference_mode():
            x = decode(self.weights, self.config.decoder, torch.cat(parts)[None], torch.tensor(places)[None], mask)
            found: NDArray[np.float32] = logits(self.weights, x[0]).numpy()
        return found


@pytest.fixture(scope="module")
def images(oracle: Oracle) -> list[ImageFeatures]:
    """Of three pictures of different sizes, one of more tokens than llama.cpp gives logits for at once."""
    model = phisight.load("demo", threads=1)
    names = ("price", "chart", "buttons")
    return [
        oracle.features(model.preprocess(PICTURES / f"{name}.png", most))
        for name, most in zip(names, (30, 120, 48), strict=True)
    ]


TEXT = (744, 323, 292, 746)
QUESTION = (198, 296, 413, 262, 522, 535, 30, 745, 744, 64, 550, 746)
SLOT = (IMAGE_SLOT,)
PROMPTS = {
    "one image": ((*TEXT, *SLOT, *QUESTION), 1),
    "two with text between them": ((*TEXT, *SLOT, *TEXT, *SLOT, *QUESTION), 2),
    "two side by side": ((*TEXT, *SLOT, *SLOT, *QUESTION), 2),
    "at both ends": ((*SLOT, *TEXT, *SLOT), 2),
    "three": ((*TEXT, *SLOT, *SLOT, *TEXT, *SLOT, *QUESTION), 3),
}


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_are_those_of_the_mask_written_out(
    models: dict[tuple[str, ImageAttention], Model],
    oracle: Oracle,
    images: list[ImageFeatures],
    engine: str,
    mode: ImageAttention,
    prompt: str,
) -> None:
    ids, count = PROMPTS[prompt]
    wanted = oracle.logits(ids, images[:count], mode)
    found = models[engine, mode].score(ids, images[:count], chunk=5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    other = oracle.logits(ids, images[:count], "causal" if mode == "bidirectional" else "bidirectional")
    assert np.abs(found - other).max() > 100 * TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_longer_than_a_batch(
    models: dict[tuple[str, ImageAttention], Model], oracle: Oracle, images: list[ImageFeatures], engine: str
) -> None:
    """llama.cpp would end the process over a batch that is not causal and has to be cut."""
    large = ImageFeatures(b"large", np.concatenate([image.features for image in images] * 4)[:600])
    ids = (*TEXT, *SLOT, *QUESTION)
    wanted = oracle.logits(ids, [large], "bidirectional")[-3:]
    found = models[engine, "bidirectional"].score(ids, [large], last=3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
@given(chunk=st.integers(1, 100), asked=st.lists(st.sampled_from(list(PROMPTS)), min_size=1, max_size=3))
@settings(max_examples=12, deadline=None)
def test_any_chunk_size_and_any_cached_prefix(
    models: dict[tuple[str, ImageAttention], Model],
    oracle: Oracle,
    images: list[ImageFeatures],
    engine: str,
    chunk: int,
    asked: list[str],
) -> None:
    """One prompt after the other on the same cache: each ends with the logits that it has alone."""
    cached = decoder_of(models[engine, "bidirectional"])
    for prompt in asked:
        ids, count = PROMPTS[prompt]
        found = cached.prefill(sequence_of(cached, ids, images[:count]), chunk=chunk)
        wanted = oracle.logits(ids, images[:count], "bidirectional")[-1]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_question_pays_for_its_own_tokens(
    models: dict[tuple[str, ImageAttention], Model], oracle: Oracle, images: list[ImageFeatures], engine: str
) -> None:
    cached = decoder_of(models[engine, "bidirectional"])
    cached.forget()
    done: list[tuple[int, int]] = []
    for ids in ((*TEXT, *SLOT, *QUESTION), (*TEXT, *SLOT, *QUESTION[::-1])):
        sequence = sequence_of(cached, ids, images[:1])
        found = cached.prefill(sequence, chunk=256, progress=lambda *step: done.append(step))
        wanted = oracle.logits(ids, images[:1], "bidirectional")[-1]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert done[-1] == (len(QUESTION), len(QUESTION))


def test_a_prompt_that_ends_in_its_image_runs_the_image_again(
    models: dict[tuple[str, ImageAttention], Model], oracle: Oracle, images: list[ImageFeatures]
) -> None:
    """Its last position must be run for its logits, and it cannot be run without the others."""
    cached = decoder_of(models["onnx", "bidirectional"])
    ids = (*TEXT, *SLOT)
    done: list[tuple[int, int]] = []
    for _ in range(2):
        found = cached.prefill(sequence_of(cached, ids, images[:1]), chunk=9, progress=lambda *s: done.append(s))
        wanted = oracle.logits(ids, images[:1], "bidirectional")[-1]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    rows = images[0].num_patches
    assert done[-2:] == [(0, rows), (rows, rows)]


def test_a_cancel_leaves_whole_images(
    models: dict[tuple[str, ImageAttention], Model], oracle: Oracle, images: list[ImageFeatures]
) -> None:
    cached = decoder_of(models["onnx", "bidirectional"])
    cached.forget()
    ids, _ = PROMPTS["two side by side"]
    sequence = sequence_of(cached, ids, images[:2])
    asked = iter([False, False, True])
    with pytest.raises(Cancelled):
        cached.prefill(sequence, chunk=256, cancel=lambda: next(asked))
    assert len(cached.keys) == sequence.images[0][1]
    wanted = oracle.logits(ids, images[:2], "bidirectional")[-1]
    np.testing.assert_allclose(cached.prefill(sequence, chunk=256), wanted, rtol=0, atol=TOLERANCE)


def test_causal_is_the_same_to_the_bit_in_both_exports(
    models: dict[tuple[str, ImageAttention], Model], exported: Exporter, images: list[ImageFeatures]
) -> None:
    ordinary = phisight.load(exported(DEMO, decoder="f32"), threads=1)
    assert ordinary.image_attention == "causal"
    ids, count = PROMPTS["three"]
    found = [model.score(ids, images[:count], chunk=31) for model in (ordinary, models["onnx", "causal"])]
    np.testing.assert_array_equal(*found)


def test_a_float16_graph(exported: Exporter, oracle: Oracle, images: list[ImageFeatures]) -> None:
    options = {"decoder": "f16", "float_type": "f16", "vision": "f16"}
    model = phisight.load(exported(DEMO, image_attention="bidirectional", **options), threads=1)
    ids, count = PROMPTS["three"]
    wanted = {mode: oracle.logits(ids, images[:count], mode) for mode in ("causal", "bidirectional")}
    error = {mode: np.abs(model.score(ids, images[:count]) - wanted[mode]).mean() for mode in wanted}
    assert error["bidirectional"] < 0.05 * error["causal"]


def test_an_image_that_memory_has_no_room_for(
    models: dict[tuple[str, ImageAttention], Model], images: list[ImageFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phisight.backends.ort.chunk_bytes", lambda config, positions: positions << 50)
    cached = decoder_of(models["onnx", "bidirectional"]).twin()
    sequence = sequence_of(cached, (*TEXT, *SLOT, *QUESTION), images[:1])
    rows = images[0].num_patches
    with pytest.raises(EngineError, match=rf"an image of {rows} tokens is run as one chunk.*use fewer patches"):
        cached.prefill(sequence, chunk=256)
    assert len(cached.keys) == 0
    monkeypatch.undo()
    assert np.isfinite(cached.prefill(sequence, chunk=256)).all()


def decoder_of(model: Model) -> CachedDecoder:
    return model._decoder


def sequence_of(cached: CachedDecoder, ids: Sequence[int], images: Sequence[ImageFeatures]) -> InputSequence:
    return splice(ids, images, vocab_size=cached.vocab_size, hidden_size=cached.hidden_size)
