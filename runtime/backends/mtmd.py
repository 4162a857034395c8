"""llama.cpp's own vision encoder (libmtmd), for an mmproj file without a `vision.onnx` beside it.

The picture is sized by us, exactly as the reference does, and handed over as RGB. libmtmd takes a picture as it is when
its sides are multiples of 16 and its pixels lie within the file's limits; otherwise it would resize it once more in its
own way, so such a picture is refused. Its features carry the error of half precision, about 6e-4 of their size.

Interface: https://github.com/ggml-org/llama.cpp/blob/master/tools/mtmd/mtmd.h
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.llamacpp_library import LlamaModel, import_llama_cpp, last_error, log_callback
from phisight.errors import EngineError
from phisight.naflex import PATCH_SIZE, Patches

__all__ = ["MtmdVisionEncoder", "patches_to_pixels"]

IMAGE_CHUNK = 1


def patches_to_pixels(patches: Patches) -> NDArray[np.uint8]:
    """The sized picture that patches were cut from, (height, width, 3) uint8: preprocessing backwards, exactly."""
    rows, cols = patches.grid
    pixels = np.rint((patches.pixel_values * np.float32(0.5) + np.float32(0.5)) * np.float32(255)).astype(np.uint8)
    picture = pixels.reshape(rows, cols, PATCH_SIZE, PATCH_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(picture).reshape(rows * PATCH_SIZE, cols * PATCH_SIZE, 3)


class MtmdVisionEncoder:
    """An mmproj file opened beside its text model, which gives the width of the image tokens."""

    def __init__(self, mmproj: Path, text: LlamaModel, *, threads: int, gpu: bool = False) -> None:
        """`mmproj` is a file that `config_from_gguf` has found to fit the text file.

        Raises EngineError without the package and if the file cannot be opened.
        """
        import_llama_cpp()
        self._mtmd = _import_mtmd()
        self._text = text  # lives as long as this: its vocabulary is read
        params = self._mtmd.mtmd_context_params_default()
        params.use_gpu = gpu
        params.n_threads = threads
        params.print_timings = False
        params.warmup = False
        self._handle: int | None = self._mtmd.mtmd_init_from_file(os.fsencode(mmproj), text.handle, params)
        if not self._handle:
            raise EngineError(f"llama.cpp cannot open {mmproj}{last_error()}: export or download it again")
        self._path = mmproj
        self._free = weakref.finalize(self, self._mtmd.mtmd_free, self._handle)

    @property
    def hidden_size(self) -> int:
        return self._text.hidden_size

    def close(self) -> None:
        """Free everything. The encoder cannot be used any more."""
        self._free()
        self._handle = None

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """(n, 768) -> (n, hidden_size) float32. Raises EngineError."""
        if self._handle is None:
            raise EngineError("this vision encoder was closed: open the model again")
        with self._chunks(patches_to_pixels(patches)) as chunks:
            image = self._image_chunk(chunks)
            tokens = self._mtmd.mtmd_input_chunk_get_n_tokens(image)
            if tokens != patches.num_patches:
                raise EngineError(
                    f"{self._path} turns a picture of {patches.num_patches} patches into {tokens} tokens, so it would "
                    "resize it: its image_min_pixels or image_max_pixels do not allow this size; use an mmproj or a "
                    "vision.onnx exported by phisight, or another number of patches"
                )
            status = self._mtmd.mtmd_encode_chunk(self._handle, image)
            if status:
                raise EngineError(f"llama.cpp failed in the vision encoder with status {status}{last_error()}")
            features = self._mtmd.mtmd_get_output_embd(self._handle)
            return np.ctypeslib.as_array(features, shape=(tokens, self.hidden_size)).copy()

    @contextmanager
    def _chunks(self, pixels: NDArray[np.uint8]) -> Iterator[Any]:
        """libmtmd's list of chunks for a prompt of one picture alone."""
        mtmd = self._mtmd
        height, width = pixels.shape[:2]
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            marker = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            status = mtmd.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), bitmaps, 1)
            if status:
                raise EngineError(f"llama.cpp cannot take the picture (status {status}){last_error()}")
            yield chunks
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _image_chunk(self, chunks: Any) -> Any:
        for index in range(self._mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self._mtmd.mtmd_input_chunks_get(chunks, index)
            if self._mtmd.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
                return chunk
        raise EngineError(f"{self._path} made nothing of the picture: it is not the mmproj of a vision model")


def _import_mtmd() -> Any:
    try:
        from llama_cpp import mtmd_cpp
    except (ImportError, OSError, RuntimeError) as error:  # a build without libmtmd
        raise EngineError(
            f"this build of llama-cpp-python has no vision ({' '.join(str(error).split())}): use vision.onnx, or "
            'pip install "phisight[gguf]" again'
        ) from None
    mtmd_cpp.mtmd_log_set(log_callback(), ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(log_callback(), ctypes.c_void_p(0))
    return mtmd_cpp
