"""What a model keeps on disk between processes: image features, and the KV cache of a prompt's beginning.

An entry's key holds where the model lies, how it was opened, and the pixels or the ids and pictures themselves; its
stamp the model's files and the versions of the packages. So what was made of older files is found and told of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.disk_cache import DiskCache
from phisight.sequence import InputSequence, Keys, common_prefix

__all__ = ["CacheIdentity", "ModelCache", "model_identity"]

PACKAGES = ("phisight", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "openvino")
"""Their versions may change what an entry holds."""

LEAST_POSITIONS = 16
"""A shorter beginning is not worth an entry."""


@dataclass(frozen=True)
class CacheIdentity:
    """Whose entries they are: `place` is the model and how it is opened, `stamp` its files and engines."""

    place: str
    stamp: str


class ModelCache:
    """The entries of one model. Beside `system_ids`, the beginning that all prompts share, it keeps pictures."""

    def __init__(
        self, disk: DiskCache, identity: CacheIdentity, system_ids: tuple[int, ...], *, pictures: bool
    ) -> None:
        """`pictures`: keep image features, and beginnings up to the last picture, too."""
        self._disk = disk
        self._identity = identity
        self._system: Keys = np.array(system_ids, dtype=np.int64)
        self._pictures = pictures

    def features(self, digest: bytes, hidden_size: int) -> NDArray[np.float32] | None:
        """Image tokens (tokens, hidden) of patches with this digest, if they were kept."""
        payload = self._disk.read(self._features_key(digest), self._identity.stamp) if self._pictures else None
        return None if payload is None else np.frombuffer(bytes(payload), np.float32).reshape(-1, hidden_size)

    def keep_features(self, digest: bytes, features: NDArray[np.float32], seconds: float) -> None:
        """Keep what took so long to encode."""
        if self._pictures:
            self._disk.write(self._features_key(digest), features.tobytes(), seconds, self._identity.stamp)

    def marks(self, sequence: InputSequence) -> tuple[int, ...]:
        """Positions, ascending, up to which the beginning of a sequence is worth keeping; one at least is behind."""
        marks = set()
        if common_prefix(self._system, sequence.keys) == len(self._system):
            marks.add(len(self._system))
        if self._pictures and sequence.images:
            marks.add(sequence.images[-1][1])
        return tuple(sorted(mark for mark in marks if LEAST_POSITIONS <= mark < len(sequence)))

    def state(self, keys: Keys) -> memoryview | None:
        """A decoder's saved state that holds just these keys."""
        return self._disk.read(self._state_key(keys), self._identity.stamp)

    def keep_state(self, keys: Keys, state: bytes, seconds: float) -> None:
        """Keep a state whose prefill took so long."""
        self._disk.write(self._state_key(keys), state, seconds, self._identity.stamp)

    def worth(self, seconds: float) -> bool:
        """Whether work that took so long is kept."""
        return seconds >= self._disk.least_seconds

    def _features_key(self, digest: bytes) -> str:
        return f"features {self._identity.place} {digest.hex()}"

    def _state_key(self, keys: Keys) -> str:
        return f"kv {self._identity.place} {hashlib.sha256(keys.tobytes()).hexdigest()}"


def model_identity(
    path: Path, files: Iterable[Path], hashes: dict[str, str], settings: dict[str, object]
) -> CacheIdentity:
    """Of the model at `path`: its files count by stated hash, size and time of change, beside settings and versions."""
    named = sorted((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files if file.is_file())
    made_of = [named, hashes, [_version(name) for name in PACKAGES]]
    return CacheIdentity(_hash([str(path.resolve()), settings]), _hash(made_of))


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
