"""`phisight.json`: what an exported model directory holds, how it was quantised and how to check it.

    {"schema": 1, "format": "onnx", "phisight": version,
     "model": {"decoder": {...}, "vision": {...} | null, "images": {...} | null, "generation": {...}},
     "options": {"decoder": "int4", "block_size": 32, ...},
     "files": {name: {"bytes": n, "sha256": hex}},
     "tensors": {name: {"part": ..., "scheme": ..., "weights": n, "bytes": n}},
     "calibration": {"sources": [...], ...}, only where weights were quantised for measured inputs}

Nothing in it depends on the time or the machine, so that the same export gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from phisight.chunks import ImageAttention
from phisight.config import DecoderConfig, GenerationDefaults, ImageBudget, ModelConfig, VisionConfig
from phisight.errors import ModelDirError

__all__ = [
    "FILE_NAME",
    "INT8_KV_GRAPH",
    "SCHEMA",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "bits_per_weight",
    "hash_file",
]

FILE_NAME = "phisight.json"
SCHEMA = 1
INT8_KV_GRAPH = "decoder.kv-int8.onnx"
"""The decoder's graph once more, with an INT8 KV cache and its scales; weights are those of decoder.onnx."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """How one tensor is stored: the part of the model, the scheme's name, number of weights, bytes on disk."""

    part: str
    scheme: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The contents of `phisight.json`."""

    format: str
    phisight: str
    model: ModelConfig
    options: dict[str, str | int]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    schema: int = SCHEMA
    calibration: dict[str, Any] | None = None

    @property
    def image_attention(self) -> ImageAttention:
        """How the model is run unless the user says otherwise; only what differs from the reference is written."""
        return "bidirectional" if self.options.get("image_attention") == "bidirectional" else "causal"

    @property
    def least_block(self) -> int | None:
        """The fewest weights that share a scale in the decoder's layers; None where none do."""
        schemes = (entry.scheme.split() for entry in self.tensors.values() if entry.part == "decoder")
        return min((int(words[2]) for words in schemes if words[1:2] == ["block"]), default=None)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check a directory's manifest, and that every file is there with its size (not its hash).

        Raises ModelDirError.
        """
        path = directory / FILE_NAME
        if not directory.is_dir():
            what = "a file" if directory.exists() else "not there"
            raise ModelDirError(f"{directory} is {what}: give an exported model directory, or demo")
        if not path.is_file():
            hint = "a checkpoint: export it first" if (directory / "config.json").is_file() else "not a model"
            raise ModelDirError(f"{directory} has no {FILE_NAME}, it is {hint}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelDirError(f"{path} cannot be read as JSON ({error}): export the model again") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ModelDirError(
                f"{path} has schema {schema}, this version of phisight reads up to {SCHEMA}: update phisight"
            )
        try:
            manifest = _from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelDirError(f"{path} is not a manifest of schema {SCHEMA} ({error!r}): export again") from None
        manifest.check_sizes(directory)
        return manifest

    def text(self) -> str:
        """The contents of `phisight.json`."""
        document = asdict(self)
        if self.calibration is None:
            del document["calibration"]
        return json.dumps(document, indent=1, sort_keys=False) + "\n"

    def write(self, directory: Path) -> None:
        """Write `phisight.json` into the directory."""
        (directory / FILE_NAME).write_text(self.text(), encoding="utf-8", newline="\n")

    def check_sizes(self, directory: Path) -> None:
        """Every file is there and has its size. Raises ModelDirError naming all that differ."""
        problems = []
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry.bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes, wanted {entry.bytes}")
        if problems:
            raise ModelDirError(f"model {directory}: {'; '.join(problems)}: export or copy it again")

    def verify(self, directory: Path, progress: Callable[[int], None] | None = None) -> None:
        """Compare every file with its SHA-256. `progress` gets the bytes read since its last call.

        Raises ModelDirError naming all that differ.
        """
        wrong = [name for name, entry in self.files.items() if hash_file(directory / name, progress) != entry.sha256]
        if wrong:
            raise ModelDirError(
                f"model {directory}: the contents of {', '.join(wrong)} do not fit the manifest's sha256: "
                "export or copy it again"
            )


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def bits_per_weight(tensors: dict[str, TensorEntry], *parts: str) -> float:
    """Stored bytes x 8 / weights over the tensors of these parts; 0 if there are none."""
    chosen = [entry for entry in tensors.values() if entry.part in parts]
    weights = sum(entry.weights for entry in chosen)
    return 8 * sum(entry.bytes for entry in chosen) / weights if weights else 0.0


def _from_json(data: dict[str, Any]) -> Manifest:
    model = data["model"]
    generation = dict(model["generation"])
    generation["eos_token_ids"] = tuple(generation["eos_token_ids"])
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema is {data['schema']!r}")
    for name in data["files"]:
        if PurePosixPath(name).name != name or name in ("", "..") or "\\" in name or ":" in name:
            raise ValueError(f"file name {name!r} leads out of the directory")
    return Manifest(
        format=data["format"],
        phisight=data["phisight"],
        model=ModelConfig(
            decoder=DecoderConfig(**model["decoder"]),
            vision=VisionConfig(**model["vision"]) if model["vision"] else None,
            images=ImageBudget(**model["images"]) if model["images"] else None,
            generation=GenerationDefaults(**generation),
        ),
        options=dict(data["options"]),
        files={name: FileEntry(**entry) for name, entry in data["files"].items()},
        tensors={name: TensorEntry(**entry) for name, entry in data["tensors"].items()},
        schema=data["schema"],
        calibration=dict(data["calibration"]) if "calibration" in data else None,
    )
