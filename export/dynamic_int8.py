"""A float32 export whose decoder ONNX Runtime's own tool has quantised to INT8: a baseline that many people use.

`onnxruntime.quantization.quantize_dynamic` (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)
rounds every matrix that a MatMul multiplies with, one scale for each output channel, and has activations rounded to
UINT8 with one scale for the whole tensor while it runs. optimum's ORTQuantizer with a dynamic configuration
(optimum-onnx 0.1.0, optimum/onnxruntime/quantization.py) hands the same graph to the same quantiser with the same
settings, so nothing of optimum is needed here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from phisight.errors import EngineError
from phisight.export.checkpoint import Checkpoint
from phisight.export.convert import check_output, export_onnx, plan_export
from phisight.export.directory import new_directory
from phisight.export.names import TensorSpec
from phisight.export.parallel import Progress
from phisight.export.plan import ExportOptions
from phisight.manifest import FileEntry, Manifest, hash_file

__all__ = ["SCHEME", "export_dynamic_int8"]

SCHEME = "dynamic int8"
"""Of the matrices, in the manifest."""
FLOAT = 1
"""TensorProto.FLOAT."""
DECODER = "decoder.onnx"


def export_dynamic_int8(checkpoint: Checkpoint, out: Path, *, progress: Progress = lambda weights: None) -> None:
    """Write the model directory `out`: decoder and head in INT8, the tower and the embeddings in float32.

    The quantiser holds the whole float32 decoder in memory. Raises InputError, CheckpointError, EngineError if the
    quantiser fails, PhisightError for a disk that is full; ModuleNotFoundError without onnx or onnxruntime.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plan = plan_export(checkpoint, ExportOptions(decoder="f32"))
    check_output(out, plan, force=False)
    with new_directory(out) as work:
        floats = work / "float"
        manifest = export_onnx(checkpoint, plan, floats, progress=progress)
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it recommends a preprocessing that changes nothing here
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize_dynamic(
                    floats / DECODER,
                    work / DECODER,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=True,
                    extra_options={"DefaultTensorType": FLOAT},  # of what comes out of operators it does not know
                )
        except OSError:
            raise
        except Exception as error:  # it raises what it likes
            raise EngineError(f"onnxruntime.quantization failed: {error}") from error
        finally:
            logging.root.setLevel(level)
        for name in manifest.files:
            if not name.startswith(DECODER):
                (floats / name).rename(work / name)
        for file in floats.iterdir():
            file.unlink()
        floats.rmdir()
        _described(manifest, plan.specs, work).write(work)


def _described(manifest: Manifest, specs: Mapping[str, TensorSpec], work: Path) -> Manifest:
    """The manifest of what lies in `work` now: an INT8 weight has a float32 scale and a zero point for each row."""
    tensors = dict(manifest.tensors)
    for name, entry in manifest.tensors.items():
        if entry.part in ("decoder", "head") and len(specs[name].shape) == 2:
            rows, columns = specs[name].shape
            tensors[name] = replace(entry, scheme=SCHEME, bytes=rows * (columns + 5))
    files = {file.name: FileEntry(file.stat().st_size, hash_file(file)) for file in sorted(work.iterdir())}
    return replace(manifest, files=files, tensors=tensors, options={**manifest.options, "decoder": SCHEME})
