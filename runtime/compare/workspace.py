"""What a comparison has found out so far, on disk: a record for each piece of work, named by a hash of all that
decides it.

So nothing in it is ever stale: another file, picture or setting has another name. A record is there once its JSON is,
which is written last; an interrupted piece is simply done again.

Logits are kept as float32. Half of that would do for INT4, but rounded to float16 a log-probability of -8 is off by
0.004, and an INT8 model's mean KL divergence is below 0.001. They take 3.3 kB a position for the built-in model and
401 kB for the 15B model: 0.4 GB for a thousand tokens of answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.errors import PhisightError

__all__ = ["Record", "Workspace", "fingerprint"]


@dataclass(frozen=True, eq=False)
class Record:
    """Values, and arrays that are mapped from their files."""

    values: dict[str, Any]
    arrays: dict[str, NDArray[np.float32]]


def fingerprint(*parts: Any) -> str:
    """A hash, hex, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Workspace:
    """A folder of records. It is made with the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, kind: str, key: str) -> Record | None:
        """The record, or None if it is not there whole."""
        path = self._path(kind, key)
        try:
            values = json.loads(path.read_bytes())
            names = values.pop("arrays")
            return Record(values, {name: np.load(self._array(path, name), mmap_mode="r") for name in names})
        except (OSError, ValueError, KeyError, AttributeError):
            return None

    def write(self, kind: str, key: str, values: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep a record. Raises PhisightError if the disk cannot hold it."""
        path = self._path(kind, key)
        beside = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, array in arrays.items():
                with beside.open("wb") as file:
                    np.save(file, array)
                beside.replace(self._array(path, name))
            beside.write_text(json.dumps({**values, "arrays": list(arrays)}), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise PhisightError(
                f"{self.folder} cannot be written ({error.strerror or error}): free some space, or give a smaller --n"
            ) from None

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key[:24]}.json"

    def _array(self, path: Path, name: str) -> Path:
        return path.with_name(f"{path.stem}.{name}.npy")
