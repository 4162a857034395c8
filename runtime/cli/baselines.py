"""Baselines of `phisight compare`: what other people's quantisers make of the same checkpoint.

    llama.cpp:TYPE           llama.cpp's quantiser on a GGUF file of the checkpoint's floats, with an mmproj in F16
    llama.cpp:TYPE+IMATRIX   the same with an importance matrix
    onnxruntime:int8         ONNX Runtime's dynamic quantisation of a float32 export, which is what optimum calls
    transformers:FOLDER      the publisher's code in FOLDER, with transformers and torch

They are made once and kept in the folder of what was measured. Where a package is missing, the row is told as absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phisight.backends.llamacpp_library import import_llama_cpp
from phisight.cli.console import Console
from phisight.cli.temporary_export import MOST_BYTES
from phisight.compare.subjects import TEXT_PARTS, Absent, ReferenceCode, Source
from phisight.compare.transformers_reference import CODE_FILE
from phisight.compare.workspace import fingerprint
from phisight.errors import EngineError, InputError, PhisightError
from phisight.loading import checkpoint_directory, is_checkpoint
from phisight.manifest import TensorEntry, bits_per_weight

if TYPE_CHECKING:
    from phisight.export.checkpoint import Checkpoint

__all__ = ["BASELINES_HELP", "Baseline", "checkpoint_of", "make_baselines", "parse_baseline"]

BASELINES_HELP = """--baseline adds what others make of the same checkpoint, which REFERENCE is, or --checkpoint names:
llama.cpp:TYPE      llama.cpp's own quantiser, TYPE as in llama-quantize: Q4_K_M, Q4_0, Q8_0, IQ4_XS, ...
llama.cpp:TYPE+FILE the same with an importance matrix, such as phisight imatrix writes
onnxruntime:int8    the decoder in INT8 by onnxruntime.quantization, which is what optimum calls
transformers:FOLDER the reference implementation in float32: FOLDER holds the publisher's modeling_phi4_visionr.py
                    (often the checkpoint itself), and its code is run
They are made in DIR/work, where they stay; a row whose packages are missing is told with the command to install."""

INSTALL = 'pip install "phisight[baselines]"'
"""All that any of them needs."""
Tool = Literal["llama.cpp", "onnxruntime", "transformers"]

FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Baseline:
    """One that was asked for. `type_name` is llama.cpp's, int8, or f32; `path` the importance matrix, or the code."""

    tool: Tool
    type_name: str
    path: Path | None = None

    @property
    def name(self) -> str:
        """In the report."""
        matrix = f" + {self.path.name}" if self.tool == "llama.cpp" and self.path is not None else ""
        return f"{self.tool} {self.type_name.upper()}{matrix}"


def parse_baseline(given: str) -> Baseline:
    """Raises InputError."""
    tool, colon, what = given.partition(":")
    if tool == "onnxruntime" and what.lower() == "int8":
        return Baseline("onnxruntime", "int8")
    if tool == "llama.cpp" and colon and what:
        type_name, _, imatrix = what.partition("+")
        path = Path(imatrix) if imatrix else None
        if path is not None and not path.is_file():
            raise InputError(f"--baseline {given}: {path} is no file: give an importance matrix, or leave it out")
        return Baseline("llama.cpp", type_name.upper(), path)
    if tool == "transformers" and what:
        if not (Path(what) / CODE_FILE).is_file():
            raise InputError(
                f"--baseline {given}: {what} holds no {CODE_FILE}: give the folder of the publisher's code"
            )
        return Baseline("transformers", "f32", Path(what))
    raise InputError(
        f"--baseline is {given!r}: give llama.cpp:TYPE, llama.cpp:TYPE+IMATRIX, onnxruntime:int8 or transformers:FOLDER"
    )


def checkpoint_of(reference: str, given: str | None) -> Path:
    """The checkpoint that baselines are made of. Raises InputError."""
    directory = checkpoint_directory(reference if given is None else given)
    if not is_checkpoint(directory):
        name = f"REFERENCE {reference}" if given is None else f"--checkpoint {given}"
        raise InputError(f"{name} is no checkpoint, and baselines are made of one: give --checkpoint DIRECTORY")
    return directory


def make_baselines(
    asked: Sequence[Baseline], directory: Path, folder: Path, threads: int, console: Console
) -> tuple[list[Source], list[Absent]]:
    """Those that can be made, in `folder`, and those that are absent.

    Raises InputError, EngineError if a quantiser fails, PhisightError for a disk that is full.
    """
    made: list[Source] = []
    absent: list[Absent] = []
    for baseline in asked:
        try:
            found = _make(baseline, directory, folder, threads, console)
        except _Missing as error:
            absent.append(Absent(baseline.name, str(error), INSTALL))
        except OSError as error:
            raise PhisightError(f"{folder} cannot be written: {error.strerror or error}: make room") from None
        else:
            if isinstance(found, Source):
                made.append(found)
            else:
                absent.append(found)
    return made, absent


class _Missing(Exception):  # noqa: N818  a reason, which becomes a row of the report
    """A package is not there."""


def _make(baseline: Baseline, directory: Path, folder: Path, threads: int, console: Console) -> Source | Absent:
    """Raises _Missing."""
    try:
        from phisight.export.checkpoint import Checkpoint

        if baseline.tool == "transformers":
            import_module("torch")
            import_module("transformers")
        elif baseline.tool == "llama.cpp":
            import_llama_cpp()
        else:
            import_module("onnxruntime.quantization")
        import_module("gguf")
    except ModuleNotFoundError as error:
        raise _Missing(f"the package {error.name} is missing") from None
    except EngineError as error:
        raise _Missing(str(error).split(":")[0]) from None
    folder.mkdir(parents=True, exist_ok=True)
    maker = _Maker(Checkpoint.open(directory), folder, threads, console)
    match baseline.tool:
        case "llama.cpp":
            return maker.llama_cpp(baseline)
        case "onnxruntime":
            return maker.dynamic_int8(baseline)
        case "transformers":
            return maker.transformers(baseline)


class _Maker:
    """Makes what is not in `folder` yet. Names tell the checkpoint's files and all versions apart."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, threads: int, console: Console) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._threads = threads
        self._console = console
        files = sorted(file for file in checkpoint.directory.iterdir() if file.is_file())
        self._origin = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def llama_cpp(self, baseline: Baseline) -> Source:
        from phisight.export.convert import export_gguf, plan_gguf
        from phisight.export.gguf_plan import GgufOptions
        from phisight.quant.imatrix import ImportanceMatrix
        from phisight.quant.llama_quantize import file_type, quantize_gguf

        file_type(baseline.type_name)  # refused before an hour's export
        matrix = None if baseline.path is None else ImportanceMatrix.read(baseline.path).digest
        options = GgufOptions(decoder=self._floats(), onnx_vision="none")
        plan = plan_gguf(self._checkpoint, options)
        floats = self._folder / f"floats-{self._key('phisight', options.decoder)}"
        if not floats.exists():
            with self._console.progress("floats as GGUF", plan.total_weights(), "w") as weights:
                export_gguf(self._checkpoint, plan, floats, progress=weights.add)
        key = self._key("llama-cpp-python", options.decoder, baseline.type_name, matrix)
        target = self._folder / f"{baseline.type_name.lower()}-{key}.gguf"
        if not target.exists():
            with self._console.progress(baseline.name, 0, " tensors", scale=False) as bar:
                text = floats / f"model-{options.decoder.lower()}.gguf"
                quantize_gguf(
                    text,
                    target,
                    baseline.type_name,
                    imatrix=baseline.path,
                    threads=self._threads,
                    progress=bar.set,
                )
        mmproj = floats / "mmproj-f16.gguf"
        return Source(baseline.name, target, mmproj if mmproj.exists() else None, baseline=True)

    def dynamic_int8(self, baseline: Baseline) -> Source | Absent:
        from phisight.export.convert import plan_export
        from phisight.export.dynamic_int8 import export_dynamic_int8
        from phisight.export.plan import ExportOptions

        plan = plan_export(self._checkpoint, ExportOptions(decoder="f32"))
        if plan.total_bytes() > MOST_BYTES:
            reason = f"its quantiser holds all {plan.total_bytes() / 1e9:.0f} GB of a float32 export in memory"
            return Absent(baseline.name, reason, None)
        target = self._folder / f"int8-{self._key('onnxruntime', 'int8')}"
        if not target.exists():
            with self._console.progress(baseline.name, plan.total_weights(), "w") as weights:
                export_dynamic_int8(self._checkpoint, target, progress=weights.add)
        return Source(baseline.name, target, baseline=True)

    def transformers(self, baseline: Baseline) -> Source:
        """Nothing is made: the checkpoint is run as it is."""
        assert baseline.path is not None
        used = [tensor for tensor in self._checkpoint.tensors.values() if tensor.spec.part != "unused"]
        entries = {
            each.spec.name: TensorEntry(each.spec.part, each.dtype, each.size, each.size * FLOAT_BYTES[each.dtype])
            for each in used
        }
        parts = {entry.part for entry in entries.values()}
        code = ReferenceCode(
            baseline.path,
            sum(entry.bytes for entry in entries.values()),
            bits_per_weight(entries, *TEXT_PARTS),
            bits_per_weight(entries, *parts),
            fingerprint(self._origin),
        )
        return Source(baseline.name, self._checkpoint.directory, baseline=True, reference_code=code)

    def _floats(self) -> str:
        """The type that holds the checkpoint's matrices as they are, in the fewest bytes."""
        types = {tensor.dtype for tensor in self._checkpoint.tensors.values() if len(tensor.shape) > 1}
        return types.pop() if types in ({"BF16"}, {"F16"}) else "F32"

    def _key(self, package: str, *parts: str | None) -> str:
        versions = {}
        for name in ("phisight", package):
            with suppress(PackageNotFoundError):
                versions[name] = version(name)
        return fingerprint(self._origin, versions, parts)[:16]
