"""What is compared: models as they lie on disk, with their sizes and a hash of all that decides their answers.

They are opened one at a time, since two of them may not fit into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast, get_args

from phisight.backends.embeddings import Embeddings
from phisight.chat_template import read_chat_template
from phisight.compare.transformers_reference import (
    CODE_FILE,
    TransformersDecoder,
    TransformersEncoder,
    open_reference,
)
from phisight.compare.workspace import fingerprint
from phisight.config import ModelConfig
from phisight.errors import InputError, TokenizerError
from phisight.gguf_file import GgufFile
from phisight.gguf_loading import GgufFiles, KvType
from phisight.loading import load
from phisight.loading_checks import decoder_graph, kv_types
from phisight.manifest import INT8_KV_GRAPH, Manifest, bits_per_weight, hash_file
from phisight.model import Model
from phisight.prompt import PromptBuilder
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer

__all__ = [
    "TEXT_PARTS",
    "Absent",
    "KvName",
    "Opening",
    "ReferenceCode",
    "Source",
    "Subject",
    "check_same_vocabulary",
    "subjects_of",
    "unique_names",
]

AccuracyLevel = Literal[0, 4]
KvName = Literal["f32", "f16", "q8_0", "int8"]
TEXT_PARTS = ("decoder", "head", "embeddings")
ENGINES = {"onnx": ("onnxruntime", "onnxruntime-gpu"), "gguf": ("llama-cpp-python", "onnxruntime", "onnxruntime-gpu")}
"""Packages whose version may change an answer."""


@dataclass(frozen=True)
class Opening:
    """How all models are opened. `device` is for ONNX."""

    threads: int | Literal["auto"] = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class ReferenceCode:
    """The publisher's code in `folder`, which runs a checkpoint in transformers.

    bytes, bpw and bpw_all are those of `Subject`, origin a fingerprint of the checkpoint's files.
    """

    folder: Path
    bytes: int
    bpw: float
    bpw_all: float
    origin: str


@dataclass(frozen=True)
class Source:
    """A model that the user named: a directory or a GGUF file, perhaps with an mmproj.

    checkpoint: the directory was made in passing, of a checkpoint. baseline: others made it. With `reference_code` the
    path is a checkpoint. kv: the type of KV cache that it is opened with, None for the usual one.
    """

    name: str
    path: Path
    mmproj: Path | None = None
    checkpoint: bool = False
    baseline: bool = False
    reference_code: ReferenceCode | None = None
    kv: KvName | None = None


@dataclass(frozen=True)
class Absent:
    """A row that was asked for and cannot be made here, why, and the command that brings what is missing, if any."""

    name: str
    reason: str
    install: str | None


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    accuracy_level: of the quantised layers, None where there are none in ONNX.
    as_run: whether the model is run so unless the user says otherwise.
    bytes: of the files that it needs. bpw: stored bits per weight of decoder, head and embeddings; bpw_all: with the
    vision tower and projector. kv_types: of the KV cache that it can be opened with, first the one that it is.
    """

    name: str
    source: Source
    format: Literal["onnx", "gguf", "checkpoint", "transformers"]
    accuracy_level: AccuracyLevel | None
    as_run: bool
    bytes: int
    bpw: float
    bpw_all: float
    config: ModelConfig
    identity: str
    opening: Opening
    kv_types: tuple[KvName, ...] = ("f32",)

    @property
    def kv(self) -> KvName:
        """The type of its KV cache."""
        return self.kv_types[0]

    def with_kv_of(self, other: Subject) -> Subject | None:
        """This one with the other's type of KV cache; None where its engine, or its export, has no such type."""
        if (self.format == "gguf") != (other.format == "gguf") or other.kv not in self.kv_types:
            return None
        if other.kv == self.kv:
            return self
        types = (other.kv, *(kind for kind in self.kv_types if kind != other.kv))
        source, identity = replace(self.source, kv=other.kv), fingerprint(self.identity, other.kv)
        return replace(self, source=source, identity=identity, kv_types=types)

    def open(self) -> Model:
        """Raises as `phisight.load`."""
        opening, level, kv = self.opening, self.accuracy_level, self.source.kv
        if self.source.reference_code is not None:
            return _open_reference(self, self.source.reference_code)
        if self.format == "gguf":
            return load(self.source.path, mmproj=self.source.mmproj, threads=opening.threads, kv_type=kv)
        return load(self.source.path, threads=opening.threads, device=opening.device, accuracy_level=level, kv_type=kv)

    def open_at(self, directory: Path) -> Model:
        """Another ONNX directory, opened as this one, at its own accuracy level. Raises as `phisight.load`."""
        return load(directory, threads=self.opening.threads, device=self.opening.device)

    def embeddings(self) -> Embeddings | None:
        """The embedding table; None where only the engine can read it."""
        return (
            None
            if self.format in ("gguf", "transformers")
            else Embeddings(self.source.path, self.config.decoder.hidden_size)
        )

    def tokenizer(self) -> Tokenizer:
        """Without opening the engine. Raises TokenizerError."""
        if self.source.path.is_file():
            return GgufFiles.of_files(self.source.path, self.source.mmproj).tokenizer
        return Tokenizer.from_file(self.source.path / "tokenizer.json")


def subjects_of(
    source: Source, opening: Opening, progress: Callable[[int], None] | None = None, *, both_levels: bool = True
) -> tuple[Subject, ...]:
    """A source as it is run and, for ONNX with quantised matrices and `both_levels`, at the other accuracy level.

    Bare GGUF files are hashed; `progress` gets the bytes read. Raises InputError.
    """
    if source.reference_code is not None:
        return (_reference(source, source.reference_code, opening),)
    if source.checkpoint and source.kv is not None:
        raise InputError(f"{source.name} is a checkpoint, whose KV cache is f32: export it with --kv int8, or give f32")
    if source.path.is_file():
        return (_bare(source, opening, progress),)
    if source.mmproj is not None:
        raise InputError(f"an mmproj goes with a GGUF file, but {source.path} is a directory: leave it out")
    manifest = Manifest.read(source.path)
    gguf = manifest.format == "gguf"
    kinds = _kv_types(source.kv) if gguf else _onnx_kv_types(source, manifest)
    twice = any(entry.part == "onnx_vision" for entry in manifest.tensors.values())
    vision = ("onnx_vision",) if twice else ("vision", "projector")
    # Of a GGUF directory that holds the tower twice, the one as ONNX is run.
    unused = "mmproj-" if gguf and "vision.onnx" in manifest.files else None
    files = {name: entry for name, entry in manifest.files.items() if not (unused and name.startswith(unused))}
    # The options too: the same files may be run otherwise, as with image_attention.
    hashes = {name: entry.sha256 for name, entry in files.items()} | {"options": repr(sorted(manifest.options.items()))}

    def subject(name: str, level: AccuracyLevel | None, *, as_run: bool) -> Subject:
        return Subject(
            name,
            source,
            "checkpoint" if source.checkpoint else "gguf" if gguf else "onnx",
            level,
            as_run,
            sum(entry.bytes for entry in files.values()),
            bits_per_weight(manifest.tensors, *TEXT_PARTS),
            bits_per_weight(manifest.tensors, *TEXT_PARTS, *vision),
            manifest.model,
            _identity(hashes, level, opening, "gguf" if gguf else "onnx", source.kv),
            opening,
            kinds,
        )

    matrices = {entry.scheme.split()[0] for entry in manifest.tensors.values() if entry.part in ("decoder", "head")}
    if gguf or not matrices & {"int4", "int8"}:
        return (subject(source.name, None, as_run=True),)
    level: AccuracyLevel = 0 if manifest.options.get("accuracy_level") == 0 else 4
    as_run = subject(source.name, level, as_run=True)
    if not both_levels:
        return (as_run,)
    other: AccuracyLevel = 4 if level == 0 else 0
    return as_run, subject(f"{source.name} (accuracy_level {other})", other, as_run=False)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last component of each path, with as many before it as tell it from the others; equal paths get a number."""
    given = [path.absolute() for path in paths]
    names = {path: path.name for path in given}
    for depth in range(2, max((len(path.parts) for path in given), default=1) + 1):
        counts = Counter(names.values())
        names = {path: "/".join(path.parts[-depth:]) if counts[name] > 1 else name for path, name in names.items()}
    seen: Counter[Path] = Counter()
    unique = []
    for path in given:
        seen[path] += 1
        unique.append(names[path] if seen[path] == 1 else f"{names[path]} ({seen[path]})")
    return unique


def check_same_vocabulary(reference: Subject, variant: Subject) -> None:
    """Raises InputError unless both give probabilities to the same tokens: nothing else can be compared."""
    sizes = [subject.config.decoder.vocab_size for subject in (reference, variant)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{variant.name} has a vocabulary of {sizes[1]} tokens, the reference {reference.name} of {sizes[0]}: "
            "compare models that were made of the same checkpoint"
        )
    first, second = reference.tokenizer(), variant.tokenizer()
    for token in range(min(first.vocab_size, second.vocab_size)):
        ours, theirs = _token(first, token), _token(second, token)
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(
                f"token {token} is {theirs!r} in {variant.name} and {ours!r} in the reference {reference.name}: "
                "compare models that were made of the same checkpoint"
            )


def _token(tokenizer: Tokenizer, token: int) -> bytes | None:
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:
        return None


def _bare(source: Source, opening: Opening, progress: Callable[[int], None] | None) -> Subject:
    """Files made by anyone, which have no manifest."""
    files = [source.path] if source.mmproj is None else [source.path, source.mmproj]
    opened = GgufFiles.of_files(source.path, source.mmproj)
    headers = [GgufFile.read(file) for file in files]
    hashes = {str(number): hash_file(file, progress) for number, file in enumerate(files)}
    return Subject(
        source.name,
        source,
        "gguf",
        None,
        True,
        sum(file.stat().st_size for file in files),
        _bits_per_weight(headers[:1]),
        _bits_per_weight(headers),
        opened.manifest.model,
        _identity(hashes, None, opening, "gguf", source.kv),
        opening,
        _kv_types(source.kv),
    )


def _reference(source: Source, code: ReferenceCode, opening: Opening) -> Subject:
    versions = {name: _version(name) for name in ("phisight", "transformers", "torch")}
    return Subject(
        source.name,
        source,
        "transformers",
        None,
        True,
        code.bytes,
        code.bpw,
        code.bpw_all,
        ModelConfig.from_checkpoint(source.path),
        fingerprint(code.origin, hash_file(code.folder / CODE_FILE), versions),
        opening,
    )


def _open_reference(subject: Subject, code: ReferenceCode) -> Model:
    path, config = subject.source.path, subject.config
    model = open_reference(code.folder, path, config, choose_threads(subject.opening.threads).count)
    tokenizer = subject.tokenizer()
    return Model(
        Manifest("transformers", version("phisight"), config, options={}, files={}, tensors={}),
        tokenizer,
        PromptBuilder(tokenizer, read_chat_template(path)),
        None if config.vision is None else TransformersEncoder(model, config.decoder.hidden_size),
        TransformersDecoder(model, config),
        context=config.decoder.context_length,
    )


def _bits_per_weight(headers: Sequence[GgufFile]) -> float:
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    return 8 * sum(tensor.bytes for tensor in tensors) / max(sum(tensor.size for tensor in tensors), 1)


def _kv_types(asked: KvName | None) -> tuple[KvName, ...]:
    """llama.cpp's, the one that is asked for first."""
    chosen = "q8_0" if asked == "int8" else asked or "f16"
    return (chosen, *(kind for kind in get_args(KvType) if kind != chosen))


def _onnx_kv_types(source: Source, manifest: Manifest) -> tuple[KvName, ...]:
    """Likewise those of an ONNX directory. Raises InputError for one that it does not have."""
    own, *others = cast(tuple[KvName, ...], kv_types(manifest))
    if decoder_graph(source.path, manifest, source.kv) == INT8_KV_GRAPH:
        return ("int8", own)
    return (own, *others)


def _identity(
    hashes: dict[str, str],
    level: AccuracyLevel | None,
    opening: Opening,
    engine: Literal["onnx", "gguf"],
    kv: KvName | None,
) -> str:
    versions = {name: _version(name) for name in ("phisight", *ENGINES[engine])}
    usual = fingerprint(hashes, level, opening.device, versions)
    return usual if kv is None else fingerprint(usual, kv)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
