"""A decoder together with the keys of what is in its KV cache, so that a common prefix is run only once.

The one rule: whatever happens - an error, a cancel, an interrupt - `keys` is true of the decoder's cache
when the next request begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import Decoder, ForkableDecoder, LogitsWanted, SavableDecoder
from phisight.chunks import ImageAttention, PrefillChunk, plan_chunks, reusable
from phisight.context import check_context
from phisight.disk_cache import DiskCacheNotice
from phisight.errors import Cancelled, EngineError, PhisightError
from phisight.model_cache import ModelCache
from phisight.sequence import InputSequence, Keys, common_prefix

__all__ = ["CachedDecoder", "Cancel", "Progress"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the positions done and those to run in all, first with 0 done; what is cached is in neither."""

Cancel: TypeAlias = Callable[[], bool]
"""Asked between runs of the engine whether to stop, such as `threading.Event().is_set`."""

# Positions by which the KV cache grows while an answer is decoded, at least; beyond, a quarter of its size.
_GROWTH = 256


class CachedDecoder:
    """One decoder, which nobody else may use, and what it has read.

    `context` is the most positions that a sequence may have. With `image_attention` bidirectional each image is run as
    one chunk in which all tokens see each other. Not for use by two threads at once.
    """

    def __init__(self, decoder: Decoder, context: int, image_attention: ImageAttention = "causal") -> None:
        self.context = context
        self.image_attention: ImageAttention = image_attention
        self._decoder = decoder
        self._read: Keys = np.empty(0, dtype=np.int64)  # keys of the cached part of the last sequence
        self._stepped: list[int] = []  # ids of the tokens cached behind it
        self._capacity = 0
        self._largest_image = 0
        self._requests = 0
        self.store: ModelCache | None = None

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        return self._decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return self._decoder.hidden_size

    @property
    def keys(self) -> Keys:
        """Keys of what is in the KV cache, (positions,) int64."""
        return np.concatenate([self._read, np.array(self._stepped, dtype=np.int64)])

    @property
    def held(self) -> int:
        """Positions in the KV cache."""
        return len(self._read) + len(self._stepped)

    @property
    def requests(self) -> int:
        """Prefills and scores begun so far: a change tells that the cache went on to another sequence."""
        return self._requests

    def twin(self) -> CachedDecoder:
        """Another one of the same weights, with a KV cache of its own. Raises EngineError if the engine cannot."""
        if not isinstance(self._decoder, ForkableDecoder):
            raise EngineError("this engine keeps one conversation at a time: use one slot")
        twin = CachedDecoder(self._decoder.fork(), self.context, self.image_attention)
        twin.store = self.store
        return twin

    def check_room(self, sequence: InputSequence) -> None:
        """Raise PromptError when the sequence is longer than the context."""
        text = len(sequence.text_ids)
        check_context(text, len(sequence) - text, self.context, answer=False)

    def forget(self) -> None:
        """Empty the cache. Its memory stays reserved."""
        self._cut(0)

    def prefill(
        self,
        sequence: InputSequence,
        *,
        chunk: int,
        room: int = 0,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32]:
        """Bring the cache to exactly this sequence -> logits of its last position, (vocab,) float32.

        Only what lies behind the common prefix is run, and always the last position. The logits are a view
        that holds until the decoder runs again. The engine gets `chunk` positions at a time, text and image
        mixed as they come unless an image is a chunk of its own; memory is reserved for `room` positions more.

        Raises Cancelled between two chunks (what was run stays cached), EngineError from the engine,
        PromptError when the sequence is longer than the context.
        """
        self.check_room(sequence)
        self._begin()
        common = min(common_prefix(self.keys, sequence.keys), len(sequence) - 1)
        marks = () if self.store is None else self.store.marks(sequence)
        common = self._restore(sequence, common, marks)
        reused = reusable(sequence, common, self.image_attention)
        self._cut(reused)
        chunks = plan_chunks(sequence, reused, chunk, self.image_attention, marks)
        self._reserve(len(sequence) + room, chunks)
        last: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        started = perf_counter()
        for run, logits in self._run(sequence, chunks, len(sequence), progress, cancel):
            last = logits[0]
            if run.stop in marks:
                self._keep(sequence.keys[: run.stop], perf_counter() - started)
        return last

    def _restore(self, sequence: InputSequence, common: int, marks: tuple[int, ...]) -> int:
        """How many positions of the sequence are cached once the longest kept beginning was loaded, if it is longer."""
        for mark in reversed(marks):
            if mark <= common or self.store is None or not isinstance(self._decoder, SavableDecoder):
                break
            if (state := self.store.state(sequence.keys[:mark])) is None:
                continue
            self._cut(0)
            try:
                self._decoder.state_load(state)
            except PhisightError as error:
                warnings.warn(f"a kept beginning is ignored: {error}", DiskCacheNotice, stacklevel=2)
                return 0
            self._read = sequence.keys[:mark]
            self._settle()
            return len(self._read)
        return common

    def _keep(self, keys: Keys, seconds: float) -> None:
        if self.store is not None and self.store.worth(seconds) and isinstance(self._decoder, SavableDecoder):
            self.store.keep_state(keys, self._decoder.state_save(), seconds)

    def steps(self, token_ids: Sequence[int], *, most: int) -> NDArray[np.float32]:
        """Run tokens behind what is cached -> logits of each, (tokens, vocab) float32, valid until the next run.

        When the room is used up it grows by a quarter, but never beyond `most` positions.
        Raises EngineError from the engine.
        """
        needed = self._decoder.length + len(token_ids)
        if needed > self._capacity:
            self._reserve(min(max(self._capacity + max(_GROWTH, self._capacity // 4), needed), most))
        ids = np.array(token_ids, dtype=np.int32)
        with self._settled():
            logits = self._decoder.append([ids], "last" if len(ids) == 1 else "all")
        self._stepped.extend(token_ids)
        return logits

    def retract(self, count: int) -> None:
        """Forget the last `count` positions: tokens run on a guess that was wrong. Raises EngineError."""
        self._cut(self.held - count)

    def score(
        self,
        sequence: InputSequence,
        *,
        chunk: int,
        last: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32]:
        """Logits of every position, or of the `last` ones, (positions, vocab) float32. Nothing cached is reused.

        The outcome alone takes 400 kB per position at the real vocabulary. Raises as `prefill`, and ValueError for
        `last` beyond the sequence.
        """
        wanted = len(sequence) if last is None else last
        if not 0 < wanted <= len(sequence):
            raise ValueError(f"the last {wanted} positions were asked for, the sequence has {len(sequence)}")
        self.check_room(sequence)
        self._begin()
        self._cut(0)
        chunks = plan_chunks(sequence, 0, chunk, self.image_attention)
        self._reserve(len(sequence), chunks)
        scores = np.empty((wanted, self.vocab_size), dtype=np.float32)
        first = len(sequence) - wanted
        for run, logits in self._run(sequence, chunks, first, progress, cancel):
            if run.stop > first:
                rows = logits[max(first - run.start, 0) :]
                scores[run.stop - first - len(rows) : run.stop - first] = rows
        return scores

    def _reserve(self, capacity: int, chunks: Sequence[PrefillChunk] = ()) -> None:
        capacity = max(capacity, self._capacity)
        largest_image = max([self._largest_image, *(len(chunk) for chunk in chunks if not chunk.causal)])
        if (capacity, largest_image) != (self._capacity, self._largest_image):
            self._decoder.reserve(capacity, largest_image)
            self._capacity, self._largest_image = capacity, largest_image

    def _begin(self) -> None:
        self._requests += 1
        self._settle()

    def _run(
        self,
        sequence: InputSequence,
        chunks: Sequence[PrefillChunk],
        first: int,
        progress: Progress | None,
        cancel: Cancel | None,
    ) -> Iterator[tuple[PrefillChunk, NDArray[np.float32]]]:
        """Run the chunks: each one and its logits.

        They are those of the chunk's last position, or of all in chunks that reach beyond `first`.
        """
        reused = chunks[0].start
        total = len(sequence) - reused
        for chunk in chunks:
            done = chunk.start - reused
            if progress is not None:
                progress(done, total)
            if cancel is not None and cancel():
                raise Cancelled(f"cancelled after {done} of {total} positions of the prompt")
            pieces = list(sequence.pieces(chunk.start, chunk.stop))
            wanted: LogitsWanted = "all" if chunk.stop > first else "last"
            with self._settled():
                logits = self._decoder.append(pieces, wanted, causal=chunk.causal)
            self._read = sequence.keys[: chunk.stop]
            yield chunk, logits
        if progress is not None:
            progress(total, total)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """A run of the decoder, which may break off midway."""
        try:
            yield
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Drop what only one side knows of: positions run but not noted, or noted but no longer held.

        Both happen at the tail alone: keys are noted in order, each after its run.
        """
        self._cut(min(self._decoder.length, len(self._read) + len(self._stepped)))

    def _cut(self, length: int) -> None:
        if self._decoder.length > length:
            self._decoder.truncate(length)
        if self._decoder.length != length:
            raise EngineError(f"the KV cache holds {self._decoder.length} positions after a cut to {length}")
        self._read, self._stepped = self.keys[:length], []
