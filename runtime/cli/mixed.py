"""`phisight export --size` and `--budget`: measure, choose types, try them, and say what each matrix costs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.cli.calibrating import calibrate, read_data, work_directory
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.quantizing import Quantized, quantize, weighed_plan
from phisight.errors import InputError, PhisightError
from phisight.threads import choose_threads
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phisight.backends.ort_session import SessionSettings
    from phisight.export.calibration.data import CalibrationData
    from phisight.export.calibration.held_out import HeldOut
    from phisight.export.calibration.sensitivity import Sensitivity
    from phisight.export.checkpoint import Checkpoint
    from phisight.export.gguf_plan import GgufPlan
    from phisight.export.mixed import MixedPlan
    from phisight.export.plan import Plan
    from phisight.quant.stored_types import StoredType

__all__ = ["MIXED_HELP", "Mixed", "add_mixed_options", "is_mixed", "mix", "plan_place"]

MIXED_HELP = """--size 4.6bpw (of decoder, head and embeddings) or 9GB (of all that is written) chooses the type of each
matrix of the decoder, the head and the embeddings by measurement: INT4 and INT8 in ONNX; Q4_0, Q8_0 and ggml's other
types in GGUF. Each matrix is quantised alone, and the KL divergence that this brings is measured on questions kept
from calibration; the plan with the least sum is taken. --budget "kld<0.01" takes the smallest plan whose divergence,
tried as a whole, is no higher. The plan is printed and saved as OUT.plan.json; change it and give it to --plan."""

HELD_OUT_TOKENS = 8192
ATTEMPTS = 5
CAUTION = 1.15
"""Each attempt is this much more careful than the one before: on few tokens a sum says little about the whole."""
SENSITIVITY, STREAMS, ATTEMPT = "sensitivity", "streams", "attempt-"
"""Folders in the work directory."""


@dataclass(frozen=True)
class Mixed:
    """The plan, what its method made of the weights, and what the plan file says."""

    plan: Plan | GgufPlan
    quantized: Quantized | None
    document: dict[str, Any]

    @property
    def calibration(self) -> dict[str, Any]:
        """For the manifest: how weights were quantised, and the plan without the types that were not taken."""
        tensors = {
            name: {key: value for key, value in entry.items() if key != "choices"}
            for name, entry in self.document["tensors"].items()
        }
        calibration = {} if self.quantized is None else self.quantized.calibration
        return {**calibration, "plan": {**self.document, "tensors": tensors}}


def add_mixed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", metavar="SIZE", help="choose types by measurement to fit 4.6bpw, or 9GB")
    parser.add_argument("--budget", metavar="LIMIT", help='choose the smallest types that keep to "kld<0.01"')
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        metavar="N",
        help=f"with --size or --budget: tokens to measure on, beside those of calibration (default: {HELD_OUT_TOKENS})",
    )


def is_mixed(args: argparse.Namespace) -> bool:
    """Whether types are to be measured. Raises InputError for options that do not go together."""
    if args.size is None and args.budget is None:
        if args.held_out_tokens is not None:
            raise InputError("--held-out-tokens goes with --size or --budget: name one, or leave it out")
        return False
    if args.size is not None and args.budget is not None:
        raise InputError("--size and --budget are two ways to say how small: give one of them")
    option = "--size" if args.size is not None else "--budget"
    for name in ("decoder", "head", "plan", "imatrix"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} does not go with {option}, which chooses types by measurement: leave it out")
    if args.held_out_tokens is not None and args.held_out_tokens < 1:
        raise InputError(f"--held-out-tokens is {args.held_out_tokens}: give 1 or more, such as {HELD_OUT_TOKENS}")
    return True


def plan_place(out: Path) -> Path:
    """Where a measured plan is saved."""
    return out.with_name(f"{out.name}.plan.json")


def mix(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    base: Plan | GgufPlan,
    remake: Callable[[tuple[tuple[str, str], ...]], Plan | GgufPlan],
    console: Console,
) -> Mixed:
    """Measure, and make the plan that meets the target. `remake` gives the base with types of single tensors.

    A dry run is not tried as a whole. Raises InputError for a target that cannot be met, PhisightError.
    """
    with needs_extra("export"):
        from phisight.export.calibration.held_out import hold_out
        from phisight.export.calibration.sensitivity import SensitivityMeter
        from phisight.export.mixed import Target, mixed_plan

    target = Target.size(args.size) if args.size is not None else Target.budget(args.budget)
    place = plan_place(args.out)
    if place.exists() and not args.force:
        raise InputError(f"{place} exists: move it away, give it to --plan, or replace it with --force")
    tokens = HELD_OUT_TOKENS if args.held_out_tokens is None else args.held_out_tokens
    data, held_out = hold_out(read_data(args, checkpoint, console, tokens), tokens, _tokenizer(checkpoint))
    console.line(
        f"held out: {len(held_out.data.sequences)} {'questions' if held_out.questions else 'texts'}, "
        f"{held_out.positions} tokens, measured at the {held_out.scored} of "
        f"{'their answers' if held_out.questions else 'their second halves'}"
    )
    work = work_directory(args.out)
    _check_work(work, SensitivityMeter.disk(checkpoint.config.decoder, held_out.positions))
    trier = _Trier(args, checkpoint, data, held_out, work, console)
    types, sensitivities = trier.measure()
    scale, scored = 1.0, held_out.scored
    for attempt in range(ATTEMPTS):
        mixed = mixed_plan(checkpoint, base, types, sensitivities, target, scale)
        plan = remake(mixed.overrides(args.format))
        if args.dry_run:
            return _finished(args, console, mixed, Mixed(plan, None, mixed.document(plan, args.format, None, scored)))
        plan, quantized, measured = trier.try_out(attempt, plan, mixed, types)
        if target.kind != "kld" or measured <= target.value:
            document = mixed.document(plan, args.format, measured, scored)
            return _finished(args, console, mixed, Mixed(plan, quantized, document))
        console.note(
            f"phisight: note: {mixed.allocation.bytes:,} bytes bring {measured:.3g}, reckoned were "
            f"{mixed.allocation.kld:.3g}: more are taken"
        )
        scale *= CAUTION ** (attempt + 1) * measured / max(mixed.allocation.kld, 1e-12)
        shutil.rmtree(work / f"{ATTEMPT}{attempt}", ignore_errors=True)
    raise PhisightError(
        f"{target.text} was not met in {ATTEMPTS} attempts, the last brought {measured:.3g}: give a --size"
    )


class _Trier:
    """What is measured and tried in the work directory."""

    def __init__(
        self,
        args: argparse.Namespace,
        checkpoint: Checkpoint,
        data: CalibrationData,
        held_out: HeldOut,
        work: Path,
        console: Console,
    ) -> None:
        self._args = args
        self._checkpoint = checkpoint
        self._data = data
        self._held_out = held_out
        self._work = work
        self._console = console
        self._method = args.method or "rtn"

    def measure(self) -> tuple[dict[str, list[StoredType]], dict[str, Sensitivity]]:
        """The types of each matrix, and its sensitivity."""
        from phisight.export.calibration.sensitivity import SensitivityMeter
        from phisight.export.plan import HESSIAN_METHODS

        types = self._types()
        folder = self._work / SENSITIVITY
        layers = self._checkpoint.config.decoder.num_layers
        total = SensitivityMeter.work(layers, self._held_out.positions)
        labels = {name: [each.label for each in kinds] for name, kinds in types.items()}
        purpose = json.dumps([self._method, labels, self._held_out.data.digest])
        with self._console.progress("sensitivity", total, "tok") as bar:
            meter = SensitivityMeter(
                self._checkpoint, types, self._held_out, self._work / STREAMS, self._settings(), bar.add
            )
            calibrate(
                self._args,
                self._checkpoint,
                self._data,
                self._console,
                meter,
                hessians=self._method in HESSIAN_METHODS,
                purpose=purpose,
                work=folder,
            )
        if not meter.sensitivities:
            meter.take_up()
        return types, meter.sensitivities

    def try_out(
        self, attempt: int, plan: Plan | GgufPlan, mixed: MixedPlan, types: dict[str, list[StoredType]]
    ) -> tuple[Plan | GgufPlan, Quantized | None, float]:
        """The plan as it is written, what its method made of the weights, and the divergence of all together."""
        from phisight.export.calibration.trial import PlannedWeights, plan_divergence, trial_work

        quantized = None
        if self._method != "rtn":
            work = self._work / f"{ATTEMPT}{attempt}"
            quantized = quantize(self._args, self._checkpoint, plan, self._data, work, self._console)
            plan = weighed_plan(self._checkpoint, plan, quantized, self._data)
        chosen = {
            name: next(each for each in kinds if each.label == mixed.allocation.choices[name].type)
            for name, kinds in types.items()
        }
        weights = PlannedWeights(
            self._checkpoint,
            chosen,
            None if quantized is None else quantized.weights,
            {} if quantized is None else quantized.moments,
        )
        total = trial_work(self._checkpoint.config.decoder.num_layers, self._held_out.positions)
        try:
            with self._console.progress("trial", total, "tok") as bar:
                divergence = plan_divergence(weights, self._held_out, self._work / STREAMS, self._settings(), bar.add)
        except OSError as error:
            raise PhisightError(f"the trial in {self._work} failed: {error.strerror or error}: make room") from error
        return plan, quantized, divergence.kld_mean

    def _types(self) -> dict[str, list[StoredType]]:
        from phisight.export.mixed import METHODS, gguf_types, onnx_types

        method = METHODS[self._method]
        if self._args.format == "onnx":
            asymmetric = bool(self._args.asymmetric)
            return onnx_types(self._checkpoint, method, self._args.block_size, asymmetric=asymmetric)
        types, note = gguf_types(self._checkpoint, method)
        if note is not None:
            self._console.note(f"phisight: note: {note}")
        return types

    def _settings(self) -> SessionSettings:
        from phisight.backends.ort_session import SessionSettings, integer_products

        given = self._args.calibration_threads
        threads = choose_threads("auto" if given is None else given).count
        return SessionSettings(threads=threads, products=integer_products())


def _check_work(work: Path, needed: int) -> None:
    """Raises InputError for a work directory of something else, or a disk without room for `needed` bytes."""
    known = (SENSITIVITY, STREAMS, ATTEMPT)
    if work.exists() and not (work.is_dir() and all(path.name.startswith(known) for path in work.iterdir())):
        raise InputError(f"{work} is neither empty nor of a measurement: remove it, or choose another OUT")
    if not work.exists() and needed > (free := shutil.disk_usage(work.absolute().parent).free):
        raise InputError(
            f"measuring needs {needed / 1e9:.2f} GB in {work}, but {free / 1e9:.2f} GB are free: make room, or give "
            f"fewer --held-out-tokens than {HELD_OUT_TOKENS}"
        )
    work.mkdir(exist_ok=True)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(checkpoint.directory / "tokenizer.json")


def _finished(args: argparse.Namespace, console: Console, mixed: MixedPlan, result: Mixed) -> Mixed:
    """Show and save the plan."""
    from phisight.export.plan_file import write_plan

    for line in _table(mixed, result.document):
        console.line(line)
    place = plan_place(args.out)
    write_plan(place, result.document)
    console.line(f"plan: {place}")
    return result


def _table(mixed: MixedPlan, document: dict[str, Any]) -> Iterator[str]:
    names = list(document["tensors"])
    width = max(map(len, names))
    kld = document["kld"]
    yield f"{'tensor':<{width}}  {'type':<24}{'bits/weight':>12}{'KLD alone':>12}{'of all':>8}"
    for name, entry in document["tensors"].items():
        share = entry["kld"] / kld["sum"] if kld["sum"] else 0.0
        yield (
            f"{name:<{width}}  {entry['type']:<24}{entry['bits_per_weight']:>12.2f}{entry['kld']:>12.2e}{share:>8.1%}"
        )
    measured = "not tried as a whole" if kld["measured"] is None else f"tried as a whole {kld['measured']:.3g}"
    yield (
        f"{mixed.target.text}: {document['bits_per_weight']:.3f} bits per weight, {document['bytes']:,} bytes of "
        f"decoder, head and embeddings; KL divergence {kld['sum']:.3g} as a sum, {measured}"
    )
