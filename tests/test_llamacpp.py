"""llama.cpp's decoder against numbers from the official reference code, and its cache: cut, grown, saved, shared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.backends.base import Piece
from phisight.backends.llamacpp import LlamaCppDecoder
from phisight.backends.llamacpp_library import LlamaModel
from phisight.cached_decoder import CachedDecoder
from phisight.errors import Cancelled, EngineError, InputError, ModelDirError
from phisight.sequence import ImageFeatures, splice

CASES = ("text_only", "micro_64x48", "micro_two", "img_250x250", "img_320x240", "png_template", "two_images")

# Of the largest logit. The weights are float32, keys and values in the cache half precision.
RELATIVE = 2e-3

Exporter = Callable[..., Path]
Open = Callable[..., LlamaCppDecoder]


@dataclass(frozen=True)
class Case:
    """A prompt with the features of its images, and what the reference said of it."""

    ids: list[int]
    features: list[NDArray[np.float32]]
    greedy: list[int]
    arrays: dict[str, NDArray[Any]]

    def pieces(self, more: list[int] | None = None) -> list[Piece]:
        """The prompt as a decoder takes it, with further ids behind it."""
        images = [ImageFeatures(bytes([n] * 32), features) for n, features in enumerate(self.features)]
        sequence = splice([*self.ids, *(more or [])], images, vocab_size=352, hidden_size=128)
        return list(sequence.pieces(0, len(sequence)))


@pytest.fixture(scope="module")
def cases(
    golden: Path, tiny_checkpoint: Path, exported: Exporter, synthetic_image: Callable[..., Any]
) -> dict[str, Case]:
    """The features come from the float32 ONNX encoder: the golden files hold only every 16th row of large images."""
    model = phisight.load(exported(tiny_checkpoint, decoder="f32"), threads=2)
    found = {}
    for record in json.loads((golden / "tiny_golden/cases.json").read_text()):
        limits = (64, 4) if record["processor"] == "micro" else (3600, 256)
        features = []
        for source in record["images"]:
            picture = next((golden / "images").glob("*.png")) if source == "png" else synthetic_image(*source)
            features.append(model.encode_image(phisight.preprocess(picture, *limits)))
        with np.load(golden / f"tiny_golden/{record['name']}.npz") as file:
            arrays = dict(file)
        greedy = record["greedy_tokens_no_cache_no_eos"]
        found[record["name"]] = Case(arrays["input_ids"].tolist(), features, greedy, arrays)
    assert tuple(found) == CASES
    return found


@pytest.fixture(scope="module")
def file(tiny_checkpoint: Path, exported_gguf: Exporter) -> Path:
    return exported_gguf(tiny_checkpoint, decoder="F32", vision="F32") / "model-f32.gguf"


@pytest.fixture
def open_decoder(file: Path) -> Open:
    def open_(**options: Any) -> LlamaCppDecoder:
        return LlamaCppDecoder(file, **{"threads": 1, "repack": False} | options)

    return open_


@pytest.fixture
def decoder(open_decoder: Open) -> LlamaCppDecoder:
    return open_decoder()


def relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def ids(*values: int) -> list[Piece]:
    return [np.array(values, np.int32)]


# The reference's numbers


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(cases: dict[str, Case], decoder: LlamaCppDecoder, name: str) -> None:
    """The reference's 24 tokens are read along, so that one pass tells every one of them."""
    case = cases[name]
    logits = decoder.append(case.pieces(case.greedy[:-1]), "all")
    prompt = len(logits) - 23
    assert decoder.length == len(logits)
    if "logits_all" in case.arrays:
        assert relative(logits[:prompt], case.arrays["logits_all"]) < RELATIVE
    assert relative(logits[:4], case.arrays["logits_first4"]) < RELATIVE
    assert relative(logits[prompt - 8 : prompt], case.arrays["logits_last8"]) < RELATIVE
    assert logits[prompt - 1 :].argmax(axis=-1).tolist() == case.greedy


@pytest.mark.parametrize("name", ["micro_two", "img_320x240", "png_template"])
def test_greedy_decoding(cases: dict[str, Case], decoder: LlamaCppDecoder, name: str) -> None:
    """Prefill, then one token after the other, each chosen here."""
    case = cases[name]
    token = int(decoder.append(case.pieces())[0].argmax())
    tokens = [token]
    while len(tokens) < 24:
        token = int(decoder.append(ids(token))[0].argmax())
        tokens.append(token)
    assert tokens == case.greedy


def test_kv_cache_in_8_bits(cases: dict[str, Case], open_decoder: Open) -> None:
    """Close to the reference, yet not as close as half precision: the cache is what was asked for."""
    case = cases["micro_two"]
    logits = open_decoder(kv_type="q8_0").append(case.pieces(), "all")
    assert RELATIVE < relative(logits, case.arrays["logits_all"]) < 5e-2
    bytes_ = {kind: open_decoder(kv_type=kind).kv_bytes_per_token for kind in ("f16", "q8_0")}
    assert bytes_ == {"f16": 2 * 4 * 2 * 32 * 2, "q8_0": 2 * 4 * 2 * 32 * 34 // 32}


def test_repacking_changes_nothing_in_float32(cases: dict[str, Case], open_decoder: Open) -> None:
    case = cases["micro_64x48"]
    assert relative(open_decoder(repack=True).append(case.pieces(), "all"), case.arrays["logits_all"]) < RELATIVE


# Pieces and chunks


@pytest.mark.parametrize("chunk", [1, 5, 64, 600])
def test_chunks(cases: dict[str, Case], decoder: LlamaCppDecoder, chunk: int) -> None:
    """Chunks that cut images and text anywhere; 600 is more than a batch of llama.cpp holds."""
    case = cases["png_template" if chunk > 64 else "micro_two"]
    sequence = case.pieces()
    whole = np.concatenate([np.full(len(piece), n) for n, piece in enumerate(sequence)])
    last = np.empty(0, np.float32)
    for start in range(0, len(whole), chunk):
        numbers = whole[start : start + chunk]
        pieces = [_part(sequence, whole, start, numbers, n) for n in np.unique(numbers)]
        last = decoder.append(pieces)
    assert relative(last[0], case.arrays["logits_last"]) < RELATIVE
    assert decoder.length == len(whole)


def _part(sequence: list[Piece], whole: NDArray[Any], start: int, numbers: NDArray[Any], n: int) -> Piece:
    """What a chunk beginning at `start` holds of piece n."""
    first = int(np.argmax(whole == n))
    begin = start + int(np.argmax(numbers == n)) - first
    return sequence[n][begin : begin + int(np.sum(numbers == n))]


def test_logits_of_all_positions_in_chunks(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    """The template's prompt is longer than several batches; the last row is what "last" gives."""
    pieces = cases["png_template"].pieces()
    count = sum(len(piece) for piece in pieces)
    assert count > 2048
    every = decoder.append(pieces, "all")
    assert every.shape == (count, 352)
    decoder.truncate(0)
    assert relative(decoder.append(pieces, "last")[0], every[-1]) < RELATIVE


def test_logits_are_the_callers_own(decoder: LlamaCppDecoder) -> None:
    first = decoder.append(ids(1, 2, 3))
    kept = first.copy()
    decoder.append(ids(4))
    decoder.reserve(4096)
    np.testing.assert_array_equal(first, kept)


def test_slices_of_a_larger_array(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    """Features that do not lie in one stretch of memory."""
    features = cases["micro_64x48"].features[0]
    strided = np.repeat(features, 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous
    found = decoder.append([strided])
    decoder.truncate(0)
    np.testing.assert_array_equal(found, decoder.append([features]))


# The cache


def test_truncate_keeps_the_prefix(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    one, two = cases["micro_64x48"], cases["micro_two"]
    shared = 6 + 12 + 1  # both begin with 6 ids, the same image of 12 patches, and a newline
    decoder.append(one.pieces())
    decoder.truncate(shared)
    assert decoder.length == shared
    rest = two.pieces()[2:]
    rest[0] = rest[0][1:]  # the newline
    assert relative(decoder.append(rest, "all"), two.arrays["logits_all"][shared:]) < RELATIVE
    decoder.truncate(1000)
    assert decoder.length == 102
    decoder.truncate(0)
    assert decoder.length == 0
    assert relative(decoder.append(one.pieces(), "all"), one.arrays["logits_all"]) < RELATIVE


def test_growth_keeps_what_is_cached(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    case = cases["micro_two"]
    decoder.reserve(40)
    decoder.append(ids(*case.ids[:6]))
    decoder.reserve(3000)
    assert decoder.length == 6
    pieces = case.pieces()
    assert relative(decoder.append(pieces[1:], "all"), case.arrays["logits_all"][6:]) < RELATIVE


def test_growth_by_appending(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    """Nothing reserved: a prompt of one step, then one of many."""
    case = cases["png_template"]
    pieces = case.pieces()
    decoder.append(pieces[:1])
    logits = decoder.append(pieces[1:], "last")
    assert relative(logits[0], case.arrays["logits_last"]) < RELATIVE


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_states(cases: dict[str, Case], open_decoder: Open, kv_type: str) -> None:
    """A saved state put into another decoder gives the very logits that the first one goes on to give."""
    case = cases["micro_64x48"]
    first = open_decoder(kv_type=kv_type)
    first.append(case.pieces())
    state = first.state_save()
    wanted = first.append(ids(7, 8, 9), "all")
    second = open_decoder(kv_type=kv_type)
    second.append(ids(1, 2, 3))
    second.state_load(state)
    assert second.length == 40
    np.testing.assert_array_equal(second.append(ids(7, 8, 9), "all"), wanted)
    first.state_load(state)
    np.testing.assert_array_equal(first.append(ids(7, 8, 9), "all"), wanted)


def test_the_state_of_nothing(decoder: LlamaCppDecoder) -> None:
    state = decoder.state_save()
    decoder.append(ids(1, 2, 3))
    decoder.state_load(state)
    assert decoder.length == 0


def test_states_that_do_not_fit(open_decoder: Open) -> None:
    decoder = open_decoder()
    decoder.append(ids(1, 2, 3))
    state = decoder.state_save()
    for wrong, message in (
        (b"", "cut short"),
        (b"x" * len(state), "another model"),
        (open_decoder(kv_type="q8_0").state_save(), "another model"),
    ):
        with pytest.raises(InputError, match=message):
            decoder.state_load(wrong)
        assert decoder.length == 3
    for damaged in (state[:-1], state[: len(state) // 2], state[:48] + b"\xff" * (len(state) - 48)):
        with pytest.raises(EngineError):
            decoder.state_load(damaged)
        assert decoder.length == 0
        decoder.append(ids(1))  # still of use


def test_two_decoders_side_by_side(cases: dict[str, Case], open_decoder: Open) -> None:
    one, two = cases["micro_64x48"], cases["micro_two"]
    left, right = open_decoder(), open_decoder()
    found: list[list[NDArray[np.float32]]] = [[], []]
    for a, b in zip(one.pieces(), two.pieces(), strict=False):
        found[0].append(left.append([a], "all"))
        found[1].append(right.append([b], "all"))
    for logits, case in zip(found, (one, two), strict=True):
        rows = np.concatenate(logits)
        assert relative(rows, case.arrays["logits_all"][: len(rows)]) < RELATIVE


def test_cancel_in_a_cached_decoder(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    """What was run before the cancel stays cached, and the next request goes on behind it."""
    case = cases["micro_two"]
    images = [ImageFeatures(bytes([n] * 32), features) for n, features in enumerate(case.features)]
    sequence = splice(case.ids, images, vocab_size=352, hidden_size=128)
    cached = CachedDecoder(decoder, 1024)
    asked = iter([False, False, True])
    with pytest.raises(Cancelled, match="after 40 of 102 positions"):
        cached.prefill(sequence, chunk=20, cancel=lambda: next(asked))
    assert decoder.length == len(cached.keys) == 40
    done: list[tuple[int, int]] = []
    logits = cached.prefill(sequence, chunk=64, progress=lambda *step: done.append(step))
    assert done[0] == (0, 62)
    assert relative(logits, case.arrays["logits_last"]) < RELATIVE


# What goes wrong


def test_a_failed_run_leaves_the_cache_as_it_was(cases: dict[str, Case], decoder: LlamaCppDecoder) -> None:
    case = cases["text_only"]
    head, tail = case.ids[:20], case.ids[20:]
    decoder.append(ids(*head))
    with pytest.raises(EngineError, match="failed in the decoder"):
        decoder.append([*ids(1, 2, 3), *ids(4, 99999)])
    assert decoder.length == 20
    assert relative(decoder.append(ids(*tail), "all"), case.arrays["logits_all"][20:]) < RELATIVE


@pytest.mark.parametrize(
    "piece", [np.zeros((3, 127), np.float32), np.zeros((3, 128), np.float64), np.zeros(3, np.int64)]
)
def test_pieces_of_another_form(decoder: LlamaCppDecoder, piece: Any) -> None:
    with pytest.raises(EngineError, match="wanted up to 256 token ids in int32 or embeddings of width 128"):
        decoder.append([piece])
    assert decoder.length == 0


def test_limits(open_decoder: Open) -> None:
    decoder = open_decoder(context=300)
    decoder.append(ids(*range(256)))
    with pytest.raises(EngineError, match="301 positions were asked for, the context is 300"):
        decoder.append(ids(*[1] * 45))
    assert decoder.length == 256
    decoder.append(ids(*[1] * 44))
    with pytest.raises(EngineError, match="nothing to run"):
        decoder.append([])
    with pytest.raises(EngineError, match="nothing to run"):
        open_decoder().append(ids())


def test_close(open_decoder: Open) -> None:
    decoder = open_decoder()
    decoder.append(ids(1))
    decoder.close()
    decoder.close()
    with pytest.raises(EngineError, match="was closed"):
        decoder.append(ids(1))


def test_gpu_layers_without_a_gpu(open_decoder: Open) -> None:
    from llama_cpp import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build has a GPU")
    with pytest.raises(EngineError, match="20 layers were asked for on a GPU"):
        open_decoder(gpu_layers=20)


def test_files_of_another_kind(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match="architecture 'clip'"):
        LlamaCppDecoder(file.with_name("mmproj-f32.gguf"), threads=1)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelDirError, match="damaged or cut short"):
        LlamaCppDecoder(cut, threads=1)
    with pytest.raises(EngineError, match=r"cannot open .*cut.gguf \(.+\): export or download it again"):
        LlamaModel(cut, gpu_layers=0, repack=False, verbose=False)  # what llama.cpp itself says is passed on


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


OPEN = """
import sys
from phisight.backends.llamacpp import LlamaCppDecoder
import numpy as np
decoder = LlamaCppDecoder(sys.argv[1], threads=1, verbose=len(sys.argv) > 2)
decoder.append([np.array([1, 2, 3], np.int32)])
print("done")
"""


def test_the_log_is_silent_unless_asked_for(file: Path) -> None:
    quiet, verbose = run(OPEN, str(file)), run(OPEN, str(file), "verbose")
    assert (quiet.stdout, quiet.stderr) == ("done\n", "")
    assert verbose.stdout == "done\n"
    assert "llama" in verbose.stderr


def test_a_missing_package_names_the_extra(file: Path) -> None:
    code = """
import sys
sys.modules["llama_cpp"] = None  # an import of it raises
from phisight.backends.llamacpp import LlamaCppDecoder
from phisight.errors import EngineError
try:
    LlamaCppDecoder(sys.argv[1], threads=1)
except EngineError as error:
    print(error)
"""
    assert 'pip install "phisight[gguf]"' in run(code, str(file)).stdout
