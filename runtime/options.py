"""What a request may ask of the generation: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from phisight.constraint import Constraint
from phisight.errors import InputError
from phisight.logprobs import MOST_ALTERNATIVES

__all__ = ["GenerateOptions"]


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is drawn and when it ends. A model's own defaults are applied before this is made.

    max_tokens: most tokens of thought and answer together; None: up to the context's end.
    temperature: 0 takes the likeliest token (greedy); more flattens the distribution.
    top_p: keep the smallest set of tokens whose probability is at least this; 1 keeps all.
    top_k: keep this many of the likeliest tokens; None keeps all.
    min_p: drop tokens less likely than this share of the likeliest one; 0 drops none.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 changes nothing.
    seed: the same seed gives the same answer; None draws one.
    stop: texts that end the answer. Text is handled above the generator, which only carries them.
    thinking_budget: most tokens of thought before it is closed by force; None: no limit.
    constraint: the form of the answer, once the thought has ended; None: free text.
    prefill_chunk: positions that the prefill runs at a time; memory and the delay of a cancel grow with it.
    logprobs: tell with each token its log-probability and those of this many likeliest ones, 0 to 20; None: tell none.
    prompt_lookup: guess tokens from what stands in prompt and answer already, and run several at once where that pays.

    Raises InputError naming the field, the value found and the value wanted.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    thinking_budget: int | None = None
    constraint: Constraint | None = None
    prefill_chunk: int = 256
    prompt_lookup: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, minimum=1, optional=True)
        _check_real("temperature", self.temperature, "0 or more", lambda value: value >= 0)
        _check_real("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        _check_int("top_k", self.top_k, minimum=1, optional=True)
        _check_real("min_p", self.min_p, "0 to 1", lambda value: 0 <= value <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "above 0", lambda value: value > 0)
        _check_int("seed", self.seed, minimum=0, optional=True)
        _check_stop(self.stop)
        _check_int("thinking_budget", self.thinking_budget, minimum=0, optional=True)
        _check_constraint(self.constraint)
        _check_int("prefill_chunk", self.prefill_chunk, minimum=1, optional=False)
        _check_bool("prompt_lookup", self.prompt_lookup)
        _check_int("logprobs", self.logprobs, minimum=0, optional=True)
        if self.logprobs is not None and self.logprobs > MOST_ALTERNATIVES:
            raise InputError(f"logprobs is {self.logprobs}: give at most {MOST_ALTERNATIVES}")


def _check_int(name: str, value: object, *, minimum: int, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        wanted = f"a whole number, {minimum} or more" + (", or None" if optional else "")
        raise InputError(f"{name} is {value!r}: give {wanted}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: give True or False")


def _check_real(name: str, value: object, wanted: str, accepts: Callable[[float], bool]) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not abs(number) <= sys.float_info.max or not accepts(number):  # not a number, infinite, too large
        raise InputError(f"{name} is {value!r}: give a number, {wanted}")


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop is {stop!r}: give a tuple of texts that are not empty")


def _check_constraint(constraint: object) -> None:
    if constraint is not None and not isinstance(constraint, Constraint):
        raise InputError(f"constraint is {constraint!r}: give a Constraint, such as Constraint.json_object(), or None")
