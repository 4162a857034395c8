"""Planning: what a variant of a model takes on this machine, told before it is made.

sizes of an export (of its files, exactly) and its configuration -> memory
rates that a small model of the same kinds of weights reaches here -> seconds of every stage
both, and what the machine has -> fits or not, and why
"""

from phisight.planner.budget import BudgetChoice, choose_patches
from phisight.planner.machine import Machine, memory_bytes, read_bytes
from phisight.planner.memory import Memory, predict_memory
from phisight.planner.rates import DecoderRates, Rates, TowerRates
from phisight.planner.times import (
    Workload,
    decode_seconds,
    encode_seconds,
    first_token_seconds,
    prefill_seconds,
    step_seconds,
)
from phisight.planner.variant import Variant
from phisight.planner.verdict import GpuShare, Verdict, gpu_share, judge, judge_pair

__all__ = [
    "BudgetChoice",
    "DecoderRates",
    "GpuShare",
    "Machine",
    "Memory",
    "Rates",
    "TowerRates",
    "Variant",
    "Verdict",
    "Workload",
    "choose_patches",
    "decode_seconds",
    "encode_seconds",
    "first_token_seconds",
    "gpu_share",
    "judge",
    "judge_pair",
    "memory_bytes",
    "predict_memory",
    "prefill_seconds",
    "read_bytes",
    "step_seconds",
]
