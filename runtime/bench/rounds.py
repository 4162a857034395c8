"""Rounds: every contender runs a stage once, in turn, then all once more, so that slow moments meet all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from phisight.bench.contender import Contender, Figures
from phisight.bench.process import ContenderProcess
from phisight.bench.stages import Stage

__all__ = ["Samples", "measure"]


@dataclass(frozen=True)
class Samples:
    """Seconds of each run, by stage and contender, and what each contender's process measured of itself."""

    seconds: dict[str, dict[str, list[float]]]
    figures: dict[str, Figures] = field(default_factory=dict)

    def of(self, stage: str, contender: str) -> list[float]:
        return self.seconds.get(stage, {}).get(contender, [])


def measure(
    contenders: Sequence[Contender],
    stages: Sequence[Stage],
    runs: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Samples:
    """Time the stages that engines run, `runs` times after one to warm up. `progress` is told of each run done.

    Processes are opened one after the other, so that their loading does not disturb each other, and stay open.
    Raises EngineError, ModelDirError.
    """
    run = [stage for stage in stages if stage.kind not in ("load", "second_question")]
    seconds: dict[str, dict[str, list[float]]] = {stage.name: {} for stage in run}
    with ExitStack() as stack:
        processes = []
        for contender in contenders:
            process = stack.enter_context(ContenderProcess(contender))
            process.opened()
            processes.append(process)
            progress(f"{contender.name}: load")
        for stage in run:
            for number in range(runs + 1):
                for process in processes if number % 2 else processes[::-1]:
                    if stage.kind == "encode" and process.contender.config.vision is None:
                        continue
                    taken = process.seconds(stage)
                    progress(f"{process.contender.name}: {stage.name}")
                    if number:
                        seconds[stage.name].setdefault(process.contender.name, []).append(taken)
        figures = {process.contender.name: process.figures() for process in processes}
    if any(stage.kind == "load" for stage in stages):
        seconds["load"] = {name: [found.load_seconds] for name, found in figures.items()}
    return Samples(seconds, figures)
