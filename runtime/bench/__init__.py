"""Timing the stages of inference, beside another engine on the same weights.

contender (an engine, its files, its settings) -> a process of its own -> seconds of a stage, when asked
stages x contenders x runs, in turn -> medians, spreads, ratios, and what a full depth would take
the machine itself -> bounds: memory bandwidth, integer rate
"""

from phisight.bench.bounds import Bounds, measure_bounds
from phisight.bench.contender import Contender, Figures
from phisight.bench.report import as_report
from phisight.bench.rounds import Samples, measure
from phisight.bench.stages import STAGES, Stage, stages_named

__all__ = [
    "STAGES",
    "Bounds",
    "Contender",
    "Figures",
    "Samples",
    "Stage",
    "as_report",
    "measure",
    "measure_bounds",
    "stages_named",
]
