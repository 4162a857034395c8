"""Where a prefill is cut into chunks, for any sequence of text and images and any part of it that is cached."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phisight.chunks import plan_chunks, reusable
from phisight.sequence import IMAGE_SLOT, ImageFeatures, InputSequence, splice


def features_of(rows: int, hidden: int = 3) -> ImageFeatures:
    return ImageFeatures(bytes([rows]), np.full((rows, hidden), rows, np.float32))


@st.composite
def sequences(draw: st.DrawFn) -> InputSequence:
    rows = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))  # 0 stands for a token of text
    ids = [IMAGE_SLOT if n else 7 for n in rows]
    return splice(ids, [features_of(n) for n in rows if n], vocab_size=50, hidden_size=3)


@given(sequence=sequences(), size=st.integers(1, 20), cached=st.floats(0, 1))
def test_chunks_cover_what_is_not_cached_and_never_cut_an_image(
    sequence: InputSequence, size: int, cached: float
) -> None:
    prefix = int(cached * (len(sequence) - 1))
    start = reusable(sequence, prefix, "bidirectional")
    assert start == prefix or any(start == first and first < prefix < stop for first, stop in sequence.images)
    chunks = plan_chunks(sequence, start, size, "bidirectional")
    assert chunks[0].start == start and chunks[-1].stop == len(sequence)
    assert all(one.stop == two.start for one, two in itertools.pairwise(chunks))
    assert [(c.start, c.stop) for c in chunks if not c.causal] == [i for i in sequence.images if i[0] >= start]
    assert all(len(chunk) <= size for chunk in chunks if chunk.causal)


@given(sequence=sequences(), size=st.integers(1, 20), cached=st.floats(0, 1))
def test_causal_chunks_are_what_they_always_were(sequence: InputSequence, size: int, cached: float) -> None:
    prefix = int(cached * (len(sequence) - 1))
    assert reusable(sequence, prefix, "causal") == prefix
    chunks = plan_chunks(sequence, prefix, size, "causal")
    assert [chunk.start for chunk in chunks] == list(range(prefix, len(sequence), size))
    assert all(chunk.causal for chunk in chunks) and chunks[-1].stop == len(sequence)


def test_a_start_inside_an_image_is_a_mistake() -> None:
    sequence = splice([7, IMAGE_SLOT, 7], [features_of(5)], vocab_size=50, hidden_size=3)
    with pytest.raises(ValueError, match="position 3 lies inside the image from 1 to 6"):
        plan_chunks(sequence, 3, 4, "bidirectional")
