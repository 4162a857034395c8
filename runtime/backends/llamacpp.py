"""llama.cpp as the decoder, for text files in GGUF.

A context of llama.cpp takes the memory of its whole KV cache when it is made, and cannot grow. So it is made when the
first request says how many positions it needs, and where a later one needs more, a larger one takes over what is
cached: through a copy in memory, with the old one freed before the new one is made. The weights stay where they are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.backends.llamacpp_library import OUTPUTS, Flash, KvType, LlamaContext, LlamaModel
from phisight.errors import EngineError, InputError
from phisight.gguf_config import config_from_gguf
from phisight.gguf_file import GgufFile

__all__ = ["LlamaCppDecoder"]

KV_BYTES: dict[KvType, tuple[int, int]] = {"f32": (4, 1), "f16": (2, 1), "q8_0": (34, 32)}
"""Bytes for so many values of the KV cache."""

STATE = struct.Struct("<8s32sQ")
STATE_MAGIC = b"phikv\0\0\1"
"""A saved state: this, a digest of what it fits, its length in positions, then llama.cpp's bytes."""


class LlamaCppDecoder:
    """A text file's decoder and its KV cache."""

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int,
        context: int | None = None,
        gpu_layers: int = 0,
        kv_type: KvType = "f16",
        repack: bool = True,
        flash: Flash | None = None,
        verbose: bool = False,
    ) -> None:
        """Open the file; `context` is the most positions that may be cached, by default the model's own context.

        `flash` is flash attention, by default off where the KV cache's type can do without: it is less exact.

        Raises ModelDirError for a file that is damaged or of another model, before llama.cpp sees it, and EngineError
        if llama.cpp is missing or cannot open the file.
        """
        file = GgufFile.read(path)
        self._config = config_from_gguf(file).decoder
        self._model: LlamaModel | None = LlamaModel(file.path, gpu_layers=gpu_layers, repack=repack, verbose=verbose)
        self._limit = self._config.context_length if context is None else context
        self._threads = threads
        self._kv_type: KvType = kv_type
        self._flash = flash
        self._context: LlamaContext | None = None
        self._length = 0

    @property
    def model(self) -> LlamaModel:
        """The opened file, for the vision encoder of the same pair. Raises EngineError once closed."""
        if self._model is None:
            raise EngineError("this decoder was closed: open the model again")
        return self._model

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def length(self) -> int:
        return self._length

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position takes in the KV cache."""
        numerator, denominator = KV_BYTES[self._kv_type]
        return self._config.kv_bytes_per_token(numerator) // denominator

    def close(self) -> None:
        """Free everything. The decoder cannot be used any more."""
        if self._context is not None:
            self._context.close()
        self._context = self._model = None  # a vision encoder may still hold the model

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """Make room for `capacity` positions in all and for batches of `largest_image`; what is cached stays. Never
        shrinks.

        Raises EngineError for more than the context, and where memory does not suffice: then nothing is cached.
        """
        self._room(capacity, largest_image)

    def _room(self, capacity: int, batch: int = 0, outputs: int = 0) -> LlamaContext:
        """A context with room for `capacity` positions, `batch` of them and `outputs` rows of logits at once."""
        if capacity > self._limit:
            raise EngineError(f"{capacity} positions were asked for, the context is {self._limit}: use a larger one")
        old, length = self._context, self._length
        if old is not None:
            if capacity <= old.capacity and batch <= old.batch and outputs <= old.outputs:
                return old
            capacity = max(capacity, old.capacity)
            batch, outputs = max(batch, old.batch), max(outputs, old.outputs)
        state = None
        if old is not None:
            state = old.state() if length else None
            old.close()
        self._length, self._context = 0, None
        new = self._context = LlamaContext(
            self.model,
            capacity,
            threads=self._threads,
            kv_type=self._kv_type,
            flash=self._flash,
            batch=batch,
            outputs=outputs,
        )
        if state is not None:
            self._set_state(new, state, length)
        return new

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if self._context is not None and length < self._length:
            self._context.truncate(length)
            self._length = length

    def fork(self) -> LlamaCppDecoder:
        """Another decoder of the same file, with an empty cache: a context of its own, made when it is needed."""
        twin = copy(self)
        twin._context, twin._length = None, 0
        return twin

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """See `phisight.backends.base.Decoder.append`. The array is the caller's own. Raises EngineError.

        llama.cpp takes either ids or embeddings in a batch: each piece is one, or several where it is long. A chunk
        that is not causal must be one batch, so it must be one piece.
        """
        count = sum(len(piece) for piece in pieces)
        if not count:
            raise EngineError("there is nothing to run: append at least one position")
        if causal:
            context = self._room(self._length + count)
            batches = _batches(pieces, logits, context.batch)
        elif len(pieces) == 1:
            wanted = count if logits == "all" else 1
            context = self._room(self._length + count, count, wanted)
            batches = [(pieces[0], wanted)]
        else:
            raise EngineError(f"a chunk of {len(pieces)} pieces cannot be one batch of llama.cpp: run them one by one")
        rows = []
        try:
            for batch, outputs in batches:
                rows.append(context.decode(batch, outputs, causal=causal))
        except BaseException:
            context.truncate(self._length)
            raise
        self._length += count
        return rows[-1] if logits == "last" else np.concatenate(rows)

    def state_save(self) -> bytes:
        """What is cached, for `state_load` of a decoder of the same file and KV type. Raises EngineError."""
        payload = b"" if self._context is None else self._context.state().tobytes()
        return STATE.pack(STATE_MAGIC, self._fingerprint(), self._length) + payload

    def state_load(self, state: bytes | memoryview) -> None:
        """Replace what is cached by a saved state.

        Raises InputError for one of another model or KV type, EngineError if llama.cpp refuses it: then nothing is
        cached.
        """
        if len(state) < STATE.size:
            raise InputError(f"the saved state has {len(state)} bytes, fewer than its header: it was cut short")
        magic, fingerprint, length = STATE.unpack_from(state)
        if magic != STATE_MAGIC or fingerprint != self._fingerprint():
            raise InputError("the saved state is of another model, KV type or version: process the prompt again")
        self.truncate(0)
        if length:
            self._set_state(self._room(length), np.frombuffer(state, np.uint8, offset=STATE.size), length)

    def _set_state(self, context: LlamaContext, state: NDArray[np.uint8], length: int) -> None:
        try:
            context.set_state(state)
            if context.length != length:
                raise EngineError(f"the KV cache holds {context.length} positions after loading a state of {length}")
        except EngineError:
            context.truncate(0)
            raise
        self._length = length

    def _fingerprint(self) -> bytes:
        """Of the decoder's shape and the form of its cache: states of other weights cannot be told apart."""
        return hashlib.sha256(f"{self._config} {self._kv_type}".encode()).digest()


def _batches(pieces: Sequence[Piece], logits: LogitsWanted, most: int) -> list[tuple[Piece, int]]:
    """The pieces cut to what one batch may hold, each with the number of its last positions that need logits."""
    step = OUTPUTS if logits == "all" else most
    batches = [piece[at : at + step] for piece in pieces for at in range(0, len(piece), step)]
    if logits == "all":
        return [(batch, len(batch)) for batch in batches]
    return [(batch, 0) for batch in batches[:-1]] + [(batches[-1], 1)]
