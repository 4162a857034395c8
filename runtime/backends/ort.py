"""ONNX Runtime: sessions, the vision encoder and the decoder with its KV cache.

The cache is bound to the same memory as input and output, so that nothing is copied from token to token. On the CPU
its memory is taken from the system page by page as positions are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.backends.embeddings import Embeddings
from phisight.backends.ort_session import SessionSettings, import_onnxruntime, on_device, open_session, shrinking_run
from phisight.chunks import chunk_bytes
from phisight.config import DecoderConfig
from phisight.errors import EngineError, InputError
from phisight.naflex import Patches

__all__ = ["OrtDecoder", "OrtVisionEncoder"]

BIDIRECTIONAL = "bidirectional"
"""The input of a decoder graph exported for it that lets all positions of a chunk see each other."""

KV_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
"""Types of the KV cache, by ONNX Runtime's names."""


class OrtVisionEncoder:
    """`vision.onnx`: patches of any grid -> image tokens."""

    def __init__(self, directory: Path, settings: SessionSettings, hidden_size: int) -> None:
        """Raises EngineError if the engine is missing or cannot open the file."""
        self._session = open_session(directory / "vision.onnx", settings)
        self._run_options = shrinking_run(settings.device)
        self._hidden_size = hidden_size

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """(n, 768) -> (n, hidden_size) float32. Raises EngineError."""
        feed = {"pixel_values": patches.pixel_values, "grid": np.array(patches.grid, np.int64)}
        try:
            features: NDArray[np.float32] = self._session.run(["image_features"], feed, self._run_options)[0]
        except Exception as error:  # the engine raises classes of its own, which differ between versions
            raise EngineError(f"ONNX Runtime failed in the vision encoder: {error}") from error
        return features


class OrtDecoder:
    """`decoder.onnx` and its embeddings."""

    def __init__(
        self, directory: Path, settings: SessionSettings, config: DecoderConfig, graph: str = "decoder.onnx"
    ) -> None:
        """`graph` is one of the directory's, each with a KV cache of another type.

        Raises EngineError if the engine is missing or cannot open the file.
        """
        self._ort = import_onnxruntime()
        self._config = config
        self._device = settings.device
        self._session = open_session(directory / graph, settings)
        self._embeddings = Embeddings(directory, config.hidden_size)
        names = {value.name: value.type for value in self._session.get_inputs()}
        self._kv_dtype = KV_DTYPES[names["past.0.key"]]
        self._bidirectional = BIDIRECTIONAL in names
        self._chunk_options = shrinking_run(settings.device)
        self._length = 0
        self._capacity = 0
        self._cache: list[tuple[Any, Any]] = []
        self._step = self._call(1, 1, causal=True)
        self._step_binding: Any = None

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
        return self._config.kv_bytes_per_token(np.dtype(self._kv_dtype).itemsize)

    @property
    def bidirectional(self) -> bool:
        """Whether the graph can run a chunk that is not causal: an option of the export."""
        return self._bidirectional

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """Make room for `capacity` positions in all; what is cached stays. Never shrinks.

        Raises EngineError when the system has no room to work on an image of `largest_image` positions as one chunk.
        """
        _check_room(chunk_bytes(self._config, largest_image), largest_image)
        if capacity <= self._capacity:
            return
        shape = (1, self._config.num_kv_heads, capacity, self._config.head_dim)
        layers = range(self._config.num_layers)
        old = self._cache
        cache = []
        for i in layers:
            pair = []
            for kind in (0, 1):
                memory = np.zeros(shape, self._kv_dtype)
                if self._length:
                    memory[:, :, : self._length] = old[i][kind].numpy()[:, :, : self._length]
                pair.append(on_device(memory, self._device))
            cache.append((pair[0], pair[1]))
        self._cache = cache
        self._capacity = capacity
        self._step_binding = None

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Their memory is written over by what follows."""
        self._length = min(self._length, length)

    def cached(self) -> Iterator[NDArray[Any]]:
        """What is cached: keys and values of each layer, (kv_heads, positions, head_dim) each."""
        return (value.numpy()[0, :, : self._length] for pair in self._cache for value in pair)

    def put(self, count: int, values: Iterable[NDArray[np.float32]]) -> None:
        """Append `count` positions that another engine ran, in the form of `cached`: for a cache in the CPU's memory.

        Raises ValueError for values of another shape, of which nothing is then cached.
        """
        stop = self._length + count
        self.reserve(stop)
        memory = (value.numpy() for pair in self._cache for value in pair)  # on the CPU that is no copy
        for old, new in zip(memory, values, strict=True):
            old[0, :, self._length : stop] = new
        self._length = stop

    def state_save(self) -> bytes:
        """What is cached, as bytes."""
        return b"".join(values.tobytes() for values in self.cached())

    def state_load(self, state: bytes | memoryview) -> None:
        """Replace what is cached by what `state_save` gave. Raises InputError for another size than whole positions."""
        length, rest = divmod(len(state), self.kv_bytes_per_token)
        if rest or not length:
            raise InputError(f"the saved state has {len(state)} bytes, not {self.kv_bytes_per_token} a position")
        heads, width = self._config.num_kv_heads, self._config.head_dim
        saved = np.frombuffer(state, self._kv_dtype).reshape(-1, 2, heads, length, width)
        self._length = 0
        capacity = max(self._capacity, length)
        self._cache, self._step_binding = [], None
        for layer in saved:
            pair = []
            for values in layer:
                memory = np.zeros((1, heads, capacity, width), self._kv_dtype)
                memory[0, :, :length] = values
                pair.append(on_device(memory, self._device))
            self._cache.append((pair[0], pair[1]))
        self._length, self._capacity = length, capacity

    def fork(self) -> OrtDecoder:
        """Another decoder of the same session, with an empty cache."""
        twin = copy(self)
        twin._length = twin._capacity = 0
        twin._cache = []
        twin._step, twin._step_binding = self._call(1, 1, causal=True), None
        return twin

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """See `phisight.backends.base.Decoder.append`. Raises EngineError."""
        if not (causal or self._bidirectional):
            raise EngineError("this decoder.onnx is causal only: export it with --image-attention bidirectional")
        count = sum(len(piece) for piece in pieces)
        self.reserve(self._length + count)
        total = self._length + count
        call = self._step if count == 1 else self._call(count, count if logits == "all" else 1, causal=causal)
        self._embeddings.fill(pieces, call.embeds[0])
        call.seqlens_k[0] = total - 1
        call.total[...] = total
        binding = self._step_binding if count == 1 else None
        if binding is None:
            binding = self._bind(call)
        elif self._device != "cpu":  # where binding an input copies it
            call.bind(binding)
        if count == 1:
            self._step_binding = binding
        try:
            self._session.run_with_iobinding(binding, None if count == 1 else self._chunk_options)
        except Exception as error:  # the engine raises classes of its own, which differ between versions
            raise EngineError(f"ONNX Runtime failed in the decoder: {error}") from error
        self._length = total
        rows: NDArray[np.float32] = call.logits[0]
        return rows

    def _call(self, n: int, wanted: int, *, causal: bool) -> _Call:
        return _Call(self._ort, self._config, n, wanted, None if not self._bidirectional else not causal)

    def _bind(self, call: _Call) -> Any:
        binding = self._session.io_binding()
        call.bind(binding)
        for i, pair in enumerate(self._cache):
            for kind, value in zip(("key", "value"), pair, strict=True):
                binding.bind_ortvalue_input(f"past.{i}.{kind}", value)
                binding.bind_ortvalue_output(f"present.{i}.{kind}", value)
        return binding


class _Call:
    """The buffers of one run: n new positions, the last `wanted` of which get logits.

    `bidirectional` is None for a graph that has no such input.
    """

    def __init__(self, ort: Any, config: DecoderConfig, n: int, wanted: int, bidirectional: bool | None) -> None:
        self.embeds: NDArray[np.float32] = np.zeros((1, n, config.hidden_size), np.float32)
        self.seqlens_k: NDArray[np.int32] = np.zeros(1, np.int32)
        self.total: NDArray[np.int32] = np.zeros((), np.int32)
        self.logits: NDArray[np.float32] = np.zeros((1, wanted, config.vocab_size), np.float32)
        # An OrtValue on the CPU shares the array's memory: writing to the array is all that a step takes.
        share = ort.OrtValue.ortvalue_from_numpy
        self.values: dict[str, Any] = {
            "inputs_embeds": share(self.embeds),
            "seqlens_k": share(self.seqlens_k),
            "total_sequence_length": share(self.total),
            "num_logits": share(np.array([wanted], np.int64)),
            "logits": share(self.logits),
        }
        if bidirectional is not None:
            self.values[BIDIRECTIONAL] = share(np.array(bidirectional))

    def bind(self, binding: Any) -> None:
        """Make these the buffers of the next run."""
        for name, value in self.values.items():
            if name == "logits":
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_ortvalue_input(name, value)


def _check_room(size: int, positions: int) -> None:
    """Ask the system for `size` bytes without using them. Raises EngineError where it refuses."""
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        raise EngineError(
            f"an image of {positions} tokens is run as one chunk where image attention is bidirectional, which takes "
            f"about {size / 2**30:.1f} GiB of memory for a moment, and the system has no such room: use fewer patches "
            "per image, or causal image attention"
        ) from None
