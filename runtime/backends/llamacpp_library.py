"""llama.cpp's C interface, by way of llama-cpp-python: models, contexts and their batches; here is all of ctypes.

Every object frees what it holds when it is closed or no longer referred to, a context before its model.

Interface: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phisight.errors import EngineError

__all__ = ["OUTPUTS", "Flash", "KvType", "LlamaContext", "LlamaModel", "import_llama_cpp", "last_error", "log_callback"]

KvType = Literal["f32", "f16", "q8_0"]
Flash = Literal["auto", "on", "off"]
"""Whether attention is computed by blocks; auto leaves it to llama.cpp."""

BATCH = 512
"""Most positions of one batch, where the cache has room for as many and no image asks for more."""
CAPACITY_STEP = 256
"""llama.cpp rounds the room of a KV cache up to a multiple of this."""
OUTPUTS = 64
"""Most positions of one batch that get logits, unless more are asked for: memory for as many rows of the vocabulary
is set aside."""

GGML_TYPES: dict[KvType, int] = {"f32": 0, "f16": 1, "q8_0": 8}
FLASH_TYPES: dict[Flash, int] = {"auto": -1, "off": 0, "on": 1}
FLASH_ATTENTION: dict[KvType, Flash] = {"f32": "off", "f16": "off", "q8_0": "on"}
"""Nothing else reads a quantised V cache. On a CPU it sums in half precision: three times the error in the logits."""
LOG_ERROR, LOG_CONTINUED = 4, 5
SEQUENCE = 0
"""The one sequence of a context."""


class _Log:
    """llama.cpp has one log for the whole process: errors are kept for messages, all of it is shown on request."""

    def __init__(self) -> None:
        self.verbose = False
        self.errors: deque[str] = deque(maxlen=3)
        self._level = 0

    def __call__(self, level: int, text: bytes | None, _: Any) -> None:
        line = (text or b"").decode("utf-8", "replace")
        if level != LOG_CONTINUED:
            self._level = level
        if self._level == LOG_ERROR and (said := " ".join(line.split())):
            self.errors.append(said)
        if self.verbose and sys.stderr is not None:
            sys.stderr.write(line)


_log = _Log()


def import_llama_cpp(*, verbose: bool = False) -> Any:
    """The module `llama_cpp.llama_cpp`, silenced. `verbose` shows the log from now on, for all of the process.

    Raises EngineError that names the extra.
    """
    llama = _import()
    _log.verbose |= verbose
    _log.errors.clear()
    return llama


@cache
def _import() -> Any:
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the package is missing, or its library cannot be loaded
        raise EngineError(
            f'llama.cpp cannot be loaded ({" ".join(str(error).split())}): pip install "phisight[gguf]"'
        ) from None
    llama_cpp.llama_log_set(log_callback(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def log_callback() -> Any:
    """The log as a function that C can call. It is kept for ever: the library never asks whether it still exists."""
    from llama_cpp import llama_cpp

    return llama_cpp.llama_log_callback(_log)


def last_error() -> str:
    """What the log said last of an error, in parentheses, or nothing."""
    said = "; ".join(_log.errors)
    return f" ({said})" if said else ""


class LlamaModel:
    """A text file, mapped into memory. `repack` keeps a second copy of its weights, laid out for other kernels."""

    def __init__(self, path: Path, *, gpu_layers: int, repack: bool, verbose: bool) -> None:
        """Raises EngineError without the package, for GPU layers without a GPU, and if the file cannot be opened."""
        llama = import_llama_cpp(verbose=verbose)
        if gpu_layers and not llama.llama_supports_gpu_offload():
            raise EngineError(
                f"{gpu_layers} layers were asked for on a GPU, but this build of llama-cpp-python finds none: "
                "build it for CUDA, Metal or Vulkan, or leave the GPU layers at 0"
            )
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = repack
        self.path = path
        self.handle: int = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise EngineError(f"llama.cpp cannot open {path}{last_error()}: export or download it again")
        self.close = weakref.finalize(self, llama.llama_model_free, self.handle)
        self.hidden_size: int = llama.llama_model_n_embd(self.handle)
        self.vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.handle))


class LlamaContext:
    """One sequence with its KV cache of at least `capacity` positions, whose memory is taken at once.

    A batch holds at most `batch` positions, `outputs` of which get logits: llama.cpp ends the process over more.
    """

    def __init__(
        self,
        model: LlamaModel,
        capacity: int,
        *,
        threads: int,
        kv_type: KvType,
        flash: Flash | None = None,
        batch: int = 0,
        outputs: int = 0,
    ) -> None:
        """`batch` and `outputs` are the least that are wanted. Raises EngineError, as where memory does not suffice."""
        self._llama = import_llama_cpp()
        self._model = model  # lives as long as its contexts
        params = self._llama.llama_context_default_params()
        params.n_ctx = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        params.n_batch = params.n_ubatch = max(BATCH, batch)  # a batch that is not causal must not be cut
        params.n_seq_max = 1
        self.outputs = params.n_outputs_max = max(OUTPUTS, outputs)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPES[kv_type]
        params.flash_attn_type = FLASH_TYPES[flash or FLASH_ATTENTION[kv_type]]
        self._handle: int = self._llama.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise EngineError(
                f"llama.cpp cannot make room for {capacity} positions, {max(BATCH, batch)} of them in one batch, with "
                f"a KV cache of {kv_type}{last_error()}: use a smaller context, or fewer patches per image"
            )
        self.close = weakref.finalize(self, self._llama.llama_free, self._handle)
        self.capacity: int = self._llama.llama_n_ctx(self._handle)
        self.batch: int = self._llama.llama_n_batch(self._handle)
        self._memory = self._llama.llama_get_memory(self._handle)

    def decode(
        self, piece: NDArray[np.int32] | NDArray[np.float32], outputs: int, *, causal: bool = True
    ) -> NDArray[np.float32]:
        """Run up to `batch` token ids (n,) int32 or embeddings (n, hidden) float32 behind what is cached.

        Unless `causal` they all see each other. Returns logits (outputs, vocab) float32 of the last `outputs`
        positions. Raises EngineError; the cache may then hold a part of the batch.
        """
        count = len(piece)
        shape, dtype = ((count,), np.int32) if piece.ndim == 1 else ((count, self._model.hidden_size), np.float32)
        if piece.shape != shape or piece.dtype != dtype or count > self.batch:  # read by pointer: checked before
            raise EngineError(
                f"a batch of {piece.dtype} of shape {piece.shape} was given to llama.cpp, wanted up to {self.batch} "
                f"token ids in int32 or embeddings of width {self._model.hidden_size} in float32"
            )
        wanted = np.zeros(count, np.int8)
        wanted[count - outputs :] = 1
        batch = self._llama.llama_batch()
        batch.n_tokens = count
        values: NDArray[Any] = np.ascontiguousarray(piece)
        if values.ndim == 1:
            batch.token = values.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        _log.errors.clear()
        self._llama.llama_set_causal_attn(self._handle, causal)
        status = self._llama.llama_decode(self._handle, batch)  # positions and sequence follow from the cache
        if status:
            raise EngineError(f"llama.cpp failed in the decoder with status {status}{last_error()}")
        if not outputs:
            return np.empty((0, self._model.vocab_size), np.float32)
        logits = self._llama.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, shape=(outputs, self._model.vocab_size)).copy()

    @property
    def length(self) -> int:
        """Positions in the cache."""
        last: int = self._llama.llama_memory_seq_pos_max(self._memory, SEQUENCE)
        return last + 1

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises EngineError."""
        if not self._llama.llama_memory_seq_rm(self._memory, SEQUENCE, length, -1):
            raise EngineError(f"llama.cpp cannot cut its KV cache to {length} positions")

    def state(self) -> NDArray[np.uint8]:
        """What is cached, as bytes. Raises EngineError."""
        size = self._llama.llama_state_seq_get_size(self._handle, SEQUENCE)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._llama.llama_state_seq_get_data(self._handle, pointer, size, SEQUENCE) != size:
            raise EngineError(f"llama.cpp cannot save the {size} bytes of its KV cache{last_error()}")
        return state

    def set_state(self, state: NDArray[np.uint8]) -> None:
        """Put back what `state` gave, of a context of the same model and KV type. Raises EngineError."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._llama.llama_state_seq_set_data(self._handle, pointer, state.size, SEQUENCE) != state.size:
            raise EngineError(f"llama.cpp cannot load the {state.size} bytes of a KV cache{last_error()}")
