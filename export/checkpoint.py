"""A checkpoint directory of safetensors: validated up front, then read one tensor at a time in slices of rows.

Format: https://github.com/huggingface/safetensors. Shards are named by `model.safetensors.index.json`, whose
`weight_map` says which file holds a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.config import ModelConfig, read_json
from phisight.errors import CheckpointError, EngineError
from phisight.export.names import EMBEDDINGS, HEAD, TensorSpec, expected_tensors
from phisight.manifest import hash_file

__all__ = ["Checkpoint", "HeldTensor", "SourceTensor", "import_safetensors"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("BF16", "F16", "F32")
ELEMENTS_AT_ONCE = 4 << 20
"""Read at once: 16 MiB in float32."""

HeldTensor: TypeAlias = tuple[Any, tuple[int, ...], str]
"""What gives a tensor's rows when it is sliced, its shape, its dtype."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint, still on disk."""

    spec: TensorSpec
    dtype: str
    _slice: Any = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def size(self) -> int:
        return self.spec.size

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis as float32."""
        part: NDArray[np.float32] = np.asarray(self._slice[start:stop]).astype(np.float32, copy=False)
        return part

    def load(self) -> NDArray[np.float32]:
        """The whole tensor as float32. Only for small ones."""
        return self.rows(0, self.shape[0])

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """All rows in order, some at a time, about 16 MiB each."""
        step = max(1, ELEMENTS_AT_ONCE * self.shape[0] // self.size)
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))

    def column_chunks(self) -> Iterator[NDArray[np.float32]]:
        """All columns of a matrix in order, some at a time: (rows, some columns), about 16 MiB each."""
        step = max(1, ELEMENTS_AT_ONCE // self.shape[0])
        for start in range(0, self.shape[1], step):
            part = self._slice[:, start : min(start + step, self.shape[1])]
            yield np.asarray(part).astype(np.float32, copy=False)


class Checkpoint:
    """A validated checkpoint directory.

    `config` is what config.json says, `tensors` maps every name to its source, unused ones included, in the
    order of the files and of the names in each. A head that is tied to the embeddings comes last, with their weights.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tensors: dict[str, SourceTensor], revision: str = ""
    ) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self._revision = revision

    @classmethod
    def open(
        cls, directory: str | Path, remote: Mapping[str, HeldTensor] | None = None, revision: str = ""
    ) -> Checkpoint:
        """Validate configuration, index, shards, names, shapes and dtypes without reading any weight.

        With `remote` tensors of a `revision` the directory needs no shards.
        Raises ConfigError, or CheckpointError that names everything missing or wrong in one line.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a directory: give a checkpoint directory with config.json and safetensors files"
            )
        config = ModelConfig.from_checkpoint(path)
        problems: list[str] = []
        found = _tensors_on_disk(path, problems) if remote is None else remote
        expected = expected_tensors(config)
        tied = expected.pop(HEAD) if read_json(path / "config.json").get("tie_word_embeddings") else None
        tensors = {}
        for name, (handle, shape, dtype) in found.items():
            if (spec := expected.get(name)) is None:
                continue
            if shape != spec.shape:
                problems.append(f"{name} has shape {list(shape)}, wanted {list(spec.shape)}")
            if dtype not in DTYPES:
                problems.append(f"{name} is {dtype}, wanted {', '.join(DTYPES)}")
            tensors[name] = SourceTensor(spec, dtype, handle)
        missing = [name for name in expected if name not in found]
        if missing:
            problems.append(f"{len(missing)} tensors are missing: {', '.join(missing)}")
        unknown = sorted(found.keys() - expected.keys())
        if unknown:
            problems.append(f"{len(unknown)} tensors are not known to this architecture: {', '.join(unknown)}")
        if problems:
            raise CheckpointError(f"checkpoint {path}: " + "; ".join(problems))
        if tied is not None:
            tensors[HEAD] = replace(tensors[EMBEDDINGS], spec=tied)
        return cls(path, config, tensors, revision)

    def fingerprint(self) -> str:
        """Changes with the files: SHA-256 (hex) of their names, sizes and times, of small ones also of their bytes."""
        digest = hashlib.sha256(self._revision.encode())
        for path in sorted(path for path in self.directory.iterdir() if path.is_file()):
            state = path.stat()
            weights = path.suffix == ".safetensors"
            content = f"{state.st_mtime_ns} {_header_hash(path)}" if weights else hash_file(path)
            digest.update(f"{path.name} {state.st_size} {content}\n".encode())
        return digest.hexdigest()

    @property
    def unused(self) -> list[str]:
        """Names of the tensors that the model never uses."""
        return [name for name, tensor in self.tensors.items() if tensor.spec.part == "unused"]


def _header_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


def _tensors_on_disk(path: Path, problems: list[str]) -> dict[str, HeldTensor]:
    """Name -> (slice, shape, dtype) of all tensors in the directory's files; faults are added to `problems`."""
    if (path / SINGLE).is_file():
        held = _open_file(path / SINGLE, problems)
        if problems:  # all tensors would be missing too, which says nothing more
            raise CheckpointError(f"checkpoint {path}: {problems[0]}")
        return held
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"checkpoint {path}: neither {SINGLE} nor {INDEX} is there: download the checkpoint completely"
        )
    weight_map = _weight_map(path / INDEX)
    found: dict[str, HeldTensor] = {}
    for shard in sorted(set(weight_map.values())):
        listed = {name for name, file in weight_map.items() if file == shard}
        if not (path / shard).is_file():
            problems.append(f"shard {shard} is missing ({len(listed)} tensors)")
            continue
        held = _open_file(path / shard, problems)
        absent = sorted(listed - held.keys())
        if held and absent:
            problems.append(f"{shard} lacks what {INDEX} lists in it: {', '.join(absent)}")
        unlisted = sorted(held.keys() - listed)
        if unlisted:
            problems.append(f"{shard} holds what {INDEX} does not list in it: {', '.join(unlisted)}")
        found.update({name: part for name, part in held.items() if name in listed})
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{index}: {name} lies in {file!r}, wanted the name of a file in the same directory")
    return weight_map


def import_safetensors() -> Any:
    """The safetensors module. Raises EngineError that names the extra."""
    try:
        import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for by name
        import safetensors
    except ImportError as error:
        raise EngineError(
            f'reading a checkpoint needs the package {error.name}: pip install "phisight[export]"'
        ) from None
    return safetensors


def _open_file(path: Path, problems: list[str]) -> dict[str, HeldTensor]:
    safetensors = import_safetensors()
    try:
        handle = safetensors.safe_open(path, framework="numpy")
        slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        problems.append(f"{path.name} is damaged or cut short ({error}): download it again")
        return {}
    return {name: (part, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
