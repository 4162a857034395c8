"""Quantising by a method that calibrates: what `phisight export --method` does before it writes."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.cli.calibrating import calibrate
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra

if TYPE_CHECKING:
    from phisight.export.calibration.data import CalibrationData
    from phisight.export.checkpoint import Checkpoint
    from phisight.export.gguf_plan import GgufPlan
    from phisight.export.plan import Plan
    from phisight.export.quantized import QuantizedWeights
    from phisight.quant.methods.base import InputStatistics

__all__ = ["Quantized", "quantize", "weighed_plan"]


@dataclass(frozen=True)
class Quantized:
    """The weights, what the manifest tells of their calibration, and the inputs' second moments."""

    weights: QuantizedWeights
    calibration: dict[str, Any]
    moments: dict[str, InputStatistics]


def quantize(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    plan: Plan | GgufPlan,
    data: CalibrationData,
    work: Path,
    console: Console,
) -> Quantized:
    """Calibrate in `work`, and quantise each layer on the way. Raises PhisightError."""
    with needs_extra("export"):
        from phisight.export.calibration.fold import AwqQuantizer
        from phisight.export.calibration.quantize import LayerQuantizer
        from phisight.export.plan import HESSIAN_METHODS
        from phisight.export.quantized import QuantizedWeights
        from phisight.quant.methods.gptq import Gptq
        from phisight.quant.methods.search import ScaleSearch

    weights = QuantizedWeights(work / "quantized")
    quantizer: LayerQuantizer | AwqQuantizer
    match plan.options.method:
        case "awq":
            quantizer = AwqQuantizer(checkpoint, plan.schemes, weights)
        case "awq+gptq":
            quantizer = AwqQuantizer(checkpoint, plan.schemes, weights, Gptq())
        case "gptq":
            quantizer = LayerQuantizer(checkpoint, plan.schemes, Gptq(), weights)
        case _:
            quantizer = LayerQuantizer(checkpoint, plan.schemes, ScaleSearch(), weights)
    schemes = {name: scheme.label for name, scheme in plan.schemes.items()}
    purpose = json.dumps([plan.options.as_json(), schemes])
    hessians = plan.options.method in HESSIAN_METHODS
    calibration = calibrate(args, checkpoint, data, console, quantizer, hessians=hessians, purpose=purpose, work=work)
    for note in quantizer.notes:
        console.note(f"phisight: note: {note}")
    if plan.options.image_attention != "causal":
        console.note("phisight: note: calibration read the pictures with causal image attention")
    return Quantized(weights, calibration.as_json(), calibration.moments())


def weighed_plan(
    checkpoint: Checkpoint, plan: Plan | GgufPlan, quantized: Quantized, data: CalibrationData
) -> Plan | GgufPlan:
    """The plan, in which types that ggml packs weigh errors by the moments that the method's calibration has seen."""
    from dataclasses import replace

    from phisight.export.calibration.importance import importance_matrix
    from phisight.export.convert import plan_gguf
    from phisight.export.gguf_plan import GgufPlan

    if not isinstance(plan, GgufPlan) or plan.options.imatrix is not None or plan.all_ours:
        return plan
    matrix = importance_matrix(quantized.moments, data)
    return plan_gguf(checkpoint, replace(plan.options, imatrix=matrix))
