"""Splicing image features into token ids, and the keys that say what stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phisight.errors import PromptError
from phisight.sequence import IMAGE_SLOT, ImageFeatures, InputSequence, common_prefix, splice

VOCAB, HIDDEN = 100, 4


def image(name: str, rows: int) -> ImageFeatures:
    features = np.arange(rows * HIDDEN, dtype=np.float32).reshape(rows, HIDDEN)
    return ImageFeatures(name.encode(), features)


def spliced(ids: Any, *images: ImageFeatures) -> InputSequence:
    return splice(ids, images, vocab_size=VOCAB, hidden_size=HIDDEN)


def test_image_features_take_the_place_of_their_slot() -> None:
    cat = image("cat", 3)
    sequence = spliced([7, 8, IMAGE_SLOT, 9], cat)
    assert len(sequence) == 6
    assert sequence.keys[[0, 1, 5]].tolist() == [7, 8, 9]
    assert (sequence.keys[2:5] < 0).all()
    assert sequence.text_ids.tolist() == [7, 8, 9]
    before, features, after = sequence.pieces(0, 6)
    assert before.tolist() == [7, 8] and before.dtype == np.int32
    assert np.shares_memory(features, cat.features)
    np.testing.assert_array_equal(features, cat.features)
    assert after.tolist() == [9]


def test_slots_at_the_ends_and_beside_each_other() -> None:
    sequence = spliced([IMAGE_SLOT, IMAGE_SLOT, 5, IMAGE_SLOT], image("a", 1), image("b", 2), image("c", 3))
    assert [piece.shape for piece in sequence.pieces(0, 7)] == [(1, 4), (2, 4), (1,), (3, 4)]
    assert sequence.starts == (0, 1, 3, 4)


def test_every_row_of_every_image_has_its_own_key() -> None:
    keys = spliced([IMAGE_SLOT, IMAGE_SLOT], image("a", 3600), image("b", 3600)).keys
    assert len(np.unique(keys)) == 7200
    assert keys.max() < 0 and keys.dtype == np.int64


def test_keys_depend_on_the_digest_alone() -> None:
    first, again = image("a", 2), ImageFeatures(b"a", np.zeros((2, HIDDEN), dtype=np.float32))
    assert spliced([IMAGE_SLOT], first).keys.tolist() == spliced([IMAGE_SLOT], again).keys.tolist()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_cut_of_the_pieces_is_that_cut_of_the_whole(data: st.DataObject) -> None:
    """Written out position by position: an id fills a row, a feature row stands for itself."""
    parts = data.draw(st.lists(st.integers(0, VOCAB - 1) | st.none(), min_size=1, max_size=12))
    images = [
        ImageFeatures(bytes([number]), np.full((rows, HIDDEN), 1000 + number, dtype=np.float32))
        for number, rows in enumerate(data.draw(st.integers(1, 5)) for part in parts if part is None)
    ]
    sequence = spliced([IMAGE_SLOT if part is None else part for part in parts], *images)

    def rows_of(piece: NDArray[Any]) -> list[float]:
        return [float(row) for row in (piece if piece.ndim == 1 else piece[:, 0])]

    whole: list[float] = []
    waiting = iter(images)
    for part in parts:
        whole += rows_of(next(waiting).features) if part is None else [part]
    start = data.draw(st.integers(0, len(sequence)))
    stop = data.draw(st.integers(start, len(sequence)))
    pieces = list(sequence.pieces(start, stop))
    assert [row for piece in pieces for row in rows_of(piece)] == whole[start:stop]
    assert all(len(piece) for piece in pieces)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_a_range_outside_of_the_sequence_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not in a sequence of 3"):
        list(spliced([1, 2, 3]).pieces(start, stop))


def test_common_prefix() -> None:
    def prefix(first: list[int], second: list[int]) -> int:
        return common_prefix(np.array(first, dtype=np.int64), np.array(second, dtype=np.int64))

    assert prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert prefix([1, 2], [1, 2, 3]) == 2
    assert prefix([1, 2], [1, 2]) == 2
    assert prefix([], [1]) == 0
    assert prefix([2], [1]) == 0
    assert prefix([1, 2, 3], [1, 9, 3]) == 1


def test_another_image_in_the_same_place_shares_only_the_text_before_it() -> None:
    cat, dog = (spliced([1, 2, IMAGE_SLOT, 3], image(name, 3)).keys for name in ("cat", "dog"))
    assert common_prefix(cat, dog) == 2


@pytest.mark.parametrize(("ids", "images"), [([1, IMAGE_SLOT], 0), ([1], 2), ([IMAGE_SLOT] * 3, 2)])
def test_slots_and_images_must_agree(ids: list[int], images: int) -> None:
    slots = ids.count(IMAGE_SLOT)
    with pytest.raises(PromptError, match=f"image slots number {slots} and its images {images}"):
        spliced(ids, *[image(str(number), 1) for number in range(images)])


@pytest.mark.parametrize("ids", [[], (), np.empty(0, dtype=np.int64)])
def test_an_empty_prompt_is_refused(ids: Any) -> None:
    with pytest.raises(PromptError, match="empty"):
        spliced(ids)


@pytest.mark.parametrize("token_id", [-1, -199, VOCAB, 2**40])
def test_ids_outside_of_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(PromptError, match=f"token id {token_id} at place 1 .* 0 to 99"):
        spliced([5, token_id])


@pytest.mark.parametrize("ids", [[1.0, 2.0], [[1, 2]], [True, False], ["1"], [2**80]])
def test_ids_that_are_not_whole_numbers_in_one_dimension_are_refused(ids: Any) -> None:
    with pytest.raises(PromptError, match="whole numbers in one dimension"):
        spliced(ids)


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((2, HIDDEN + 1), dtype=np.float32),
        np.zeros((2, HIDDEN), dtype=np.float64),
        np.zeros((0, HIDDEN), dtype=np.float32),
        np.zeros(HIDDEN, dtype=np.float32),
        np.zeros((), dtype=np.float32),
    ],
)
def test_features_of_another_shape_or_type_are_refused(features: Any) -> None:
    with pytest.raises(PromptError, match=r"features of image 1 .*\(1 or more, 4\)"):
        spliced([IMAGE_SLOT], ImageFeatures(b"x", features))


def test_golden_input_ids_and_embeddings(golden: Path) -> None:
    """The reference's own splice of two images, position by position."""
    with np.load(golden / "tiny_golden/micro_two.npz") as case:
        ids, embeddings = case["input_ids"], case["inputs_embeds"]
        features = [case["img0/projected"], case["img1/projected"]]
    images = [ImageFeatures(bytes([number]), rows) for number, rows in enumerate(features)]
    sequence = splice(ids, images, vocab_size=352, hidden_size=128)
    assert len(sequence) == len(embeddings) == 102
    position = 0
    for piece in sequence.pieces(0, len(sequence)):
        if piece.ndim == 2:
            np.testing.assert_allclose(piece, embeddings[position : position + len(piece)], atol=1e-6)
        position += len(piece)
    # Equal ids have equal embeddings, so each text position is checked against the first of its id.
    for token_id in np.unique(sequence.text_ids):
        same = embeddings[sequence.keys == token_id]
        assert (same == same[0]).all()
