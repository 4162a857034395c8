"""Measuring this machine for a plan: a small model of each kind of weights, in a temporary directory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from phisight.bench import Contender
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.config import ModelConfig
from phisight.errors import EngineError
from phisight.planner.probe import measure_prepare, measure_probe
from phisight.planner.rates import DecoderRates, Rates, TowerRates

if TYPE_CHECKING:
    from phisight.export.gguf_plan import GgufOptions
    from phisight.export.plan import ExportOptions

__all__ = ["measure_rates"]


def measure_rates(
    config: ModelConfig, choices: Sequence[ExportOptions | GgufOptions], threads: int, console: Console
) -> Rates:
    """Rates of the decoders and towers of some exports. What an engine that is missing would run is left out, and said.

    Raises EngineError where no engine is there.
    """
    with needs_extra("export"):
        from phisight.export.gguf_plan import GgufOptions
        from phisight.export.plan import ExportOptions
        from phisight.export.variants import decoder_kind, head_kind
    decoders: dict[str, DecoderRates] = {}
    towers: dict[str, TowerRates] = {}
    missing: dict[str, EngineError] = {}
    onnx = [options for options in choices if isinstance(options, ExportOptions)]
    forms = {options.resolved_vision for options in onnx}
    # A tower beside GGUF files is timed with a decoder that nobody asked for, if no other has it; so is another head.
    asked = {options.onnx_vision for options in choices if isinstance(options, GgufOptions)}
    extra = [ExportOptions(vision=form) for form in asked - forms if form != "none"] if config.vision else []
    known = {decoder_kind(options) for options in choices}
    heads = {options.resolved_head for options in onnx if head_kind(options) not in known}
    extra += [ExportOptions(decoder=head) for head in heads]
    with console.progress("measuring", len(choices) + len(extra), " models", scale=False) as bar:
        for options in (*choices, *extra):
            bar.tell(decoder_kind(options))
            wanted = isinstance(options, ExportOptions) and options.resolved_vision not in towers
            try:
                decoder, tower = _measure(config, options, threads, tower=wanted)
            except EngineError as error:
                missing[decoder_kind(options).split()[0]] = error
            else:
                decoders[decoder_kind(options)] = decoder
                if tower is not None and isinstance(options, ExportOptions):
                    towers[options.resolved_vision] = tower
            bar.add(1)
    if not decoders:
        raise next(iter(missing.values()))
    for form, reason in missing.items():
        console.note(f"phisight: note: times of {form} models are not told: {reason}")
    return Rates(threads, decoders, towers, measure_prepare())


def _measure(
    config: ModelConfig, options: ExportOptions | GgufOptions, threads: int, *, tower: bool
) -> tuple[DecoderRates, TowerRates | None]:
    from phisight.export.gguf_plan import GgufOptions
    from phisight.export.probe import probe_bytes, probe_config, write_gguf_probe, write_onnx_probe

    small = probe_config(config)
    if not tower:
        small = replace(small, vision=None, images=None)
    # On Windows files that an ended process held may not be free at once.
    with tempfile.TemporaryDirectory(prefix="phisight-plan-", ignore_cleanup_errors=True) as folder:
        if isinstance(options, GgufOptions):
            write_gguf_probe(small, options, Path(folder))
            repack = options.decoder in ("Q4_0", "IQ4_NL")
            contender = Contender("probe", "llama.cpp", Path(folder), small, threads, repack=repack, flash="off")
        else:
            write_onnx_probe(small, options, Path(folder))
            contender = Contender("probe", "onnxruntime", Path(folder), small, threads)
        return measure_probe(contender, probe_bytes(small, options))
