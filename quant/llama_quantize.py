"""llama.cpp's own quantiser: a GGUF file of floats -> one of any type that it knows, as llama-quantize makes it.

It runs in a process of its own, since ggml ends the process over some faults, and its log says how far it is:

    python -m phisight.quant.llama_quantize SOURCE TARGET FILE_TYPE THREADS [IMPORTANCE_MATRIX]

Interface: `llama_model_quantize` in https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.backends.llamacpp_library import import_llama_cpp
from phisight.errors import EngineError, InputError, PhisightError
from phisight.quant.imatrix import ImportanceMatrix

__all__ = ["file_type", "quantize_gguf"]

PREFIX = "MOSTLY_"
STEP = re.compile(r"\[ *(\d+)/ *(\d+)\]")
"""Of a line of the log: a tensor's number and how many there are."""
KEPT_LINES = 3


def file_type(name: str) -> int:
    """llama.cpp's number of a type such as Q4_K_M, whatever its case. Raises InputError."""
    types = {member.name.removeprefix(PREFIX): member.value for member in gguf.LlamaFileType if PREFIX in member.name}
    if name.upper() not in types:
        raise InputError(f"llama.cpp has no type {name!r}: give one of {', '.join(sorted(types))}")
    return int(types[name.upper()])


def quantize_gguf(
    source: Path,
    target: Path,
    type_name: str,
    *,
    imatrix: Path | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `target`, which appears under its name when it is complete. `progress` gets tensors done and in all.

    Raises InputError for a type that llama.cpp does not know or a matrix that cannot be read, EngineError if the
    quantiser fails or ends its process, PhisightError if `target` cannot be written.
    """
    number = file_type(type_name)
    part = target.with_name(f"{target.name}.partial")
    command = [sys.executable, "-m", __name__, str(source), str(part), str(number), str(threads)]
    if imatrix is not None:
        ImportanceMatrix.read(imatrix)  # what is wrong with it is better said here
        command.append(str(imatrix))
    said: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    text = line.decode("utf-8", "replace").strip()
                    if found := STEP.search(text):
                        progress(int(found[1]), int(found[2]))
                    elif text:
                        said.append(text)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise EngineError(
                f"llama.cpp could not make {type_name.upper()} of {source} (status {process.returncode}): "
                f"{'; '.join(said)}"
            )
        part.replace(target)
    except OSError as error:
        raise PhisightError(f"{target} cannot be written: {error.strerror or error}: make room, or move it") from None
    finally:
        part.unlink(missing_ok=True)


def _quantize(source: str, target: str, number: int, threads: int, imatrix: str | None) -> int:
    """In this process. Returns llama.cpp's status: 0 is success."""
    llama = import_llama_cpp(verbose=True)
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    kept: list[NDArray[np.float32]] = []
    if imatrix is not None:
        matrix = ImportanceMatrix.read(Path(imatrix))
        entries = (llama.llama_model_imatrix_data * (len(matrix.weights) + 1))()  # the last, without a name, ends it
        for entry, (name, each) in zip(entries, matrix.weights.items(), strict=False):
            kept.append(each.importance)
            entry.name, entry.size = name.encode(), len(kept[-1])
            entry.data = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    return int(llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    source, target, number, threads, *matrix = sys.argv[1:]
    try:
        status = _quantize(source, target, int(number), int(threads), matrix[0] if matrix else None)
    except PhisightError as error:
        sys.exit(str(error))
    sys.exit(min(status, 1))
