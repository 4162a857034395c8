"""Parameters of a chat request apart from its messages: which are taken, which change nothing, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phisight.prompt import Mode
from phisight.serve.errors import refused

__all__ = ["Reasoning", "boolean", "check_known", "optional", "reasoning", "stop_texts", "token_limit", "whole"]

TAKEN = frozenset(
    {
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "response_format",
        "logprobs",
        "top_logprobs",
        "reasoning_effort",
        "chat_template_kwargs",
        "thinking_budget",
        "max_patches",
    }
)

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    }
)
"""They tell OpenAI who asks and how to bill, keep or speed up; an answer does not depend on them."""

CHANGES_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "verbosity": ("medium",),
}
"""Parameters that cannot be honoured, with the values that ask for nothing."""

INSTEAD = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "tools": "describe them in a message, and ask for JSON",
    "functions": "describe them in a message, and ask for JSON",
}


MOST_STOPS = 16
LONGEST_STOP = 1000


@dataclass(frozen=True)
class Reasoning:
    """How an answer opens, and the most tokens of its thought."""

    mode: Mode = "auto"
    budget: int | None = None


EFFORTS = {
    "none": Reasoning("nothink"),
    "minimal": Reasoning("think", 128),
    "low": Reasoning("think", 512),
    "medium": Reasoning("think", 2048),
    "high": Reasoning("think"),
    "xhigh": Reasoning("think"),
}


def check_known(body: Mapping[str, Any]) -> None:
    """Raises ApiError for the first parameter that cannot be honoured."""
    for name, value in body.items():
        if value is None or name in TAKEN or name in HARMLESS:
            continue
        if name not in CHANGES_NOTHING:
            raise refused(name, f"the parameter {name[:80]} is not known here: leave it out", "unknown_parameter")
        if value not in CHANGES_NOTHING[name] or (
            isinstance(value, bool) != isinstance(CHANGES_NOTHING[name][0], bool)
        ):
            way_out = INSTEAD.get(name, "leave it out")
            raise refused(name, f"the parameter {name} cannot be honoured: {way_out}", "unsupported_parameter")


def optional(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """A value of a type, None if it is missing or null. Raises ApiError."""
    value = body.get(name)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise refused(name, f"{name} is {_shown(value)}, wanted {wanted}", "invalid_type")
    return value


def boolean(body: Mapping[str, Any], name: str) -> bool:
    """false if it is missing or null. Raises ApiError."""
    return bool(optional(body, name, bool, "true or false"))


def whole(body: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    """Raises ApiError unless it is a whole number from `least` to `most`, missing or null."""
    value: int | None = optional(body, name, int, "a whole number")
    if value is not None and (value < least or (most is not None and value > most)):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise refused(name, f"{name} is {value if abs(value) < 10**12 else 'too large'}, wanted {wanted}")
    return value


def token_limit(body: Mapping[str, Any], most: int | None) -> int | None:
    """max_tokens under either of its names, and not more than the server's own limit. Raises ApiError."""
    old, new = whole(body, "max_tokens", 1), whole(body, "max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise refused("max_tokens", f"max_tokens is {old} and max_completion_tokens {new}: give one of them")
    asked = new if old is None else old
    given = [limit for limit in (asked, most) if limit is not None]
    return min(given, default=None)


def stop_texts(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Raises ApiError unless it is a text, a list of at most 16, missing or null."""
    value = optional(body, "stop", (str, list), "a text or a list of texts")
    texts = [value] if isinstance(value, str) else value or []
    if len(texts) > MOST_STOPS or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts):
        raise refused(
            "stop",
            f"stop holds more than {MOST_STOPS} texts, or one that is empty, over {LONGEST_STOP} characters or no text",
        )
    return tuple(texts)


def reasoning(body: Mapping[str, Any]) -> Reasoning:
    """From reasoning_effort, chat_template_kwargs and thinking_budget, which must agree. Raises ApiError.

    The template's enable_thinking (or thinking) true and false open a thought or a direct answer, thinking_budget
    limits the thought; without any of them the model decides.
    """
    effort = optional(body, "reasoning_effort", str, f"one of {', '.join(EFFORTS)}")
    if effort is not None and effort not in EFFORTS:
        raise refused("reasoning_effort", f"reasoning_effort is {_shown(effort)}, wanted one of {', '.join(EFFORTS)}")
    chosen = EFFORTS[effort] if effort else Reasoning()
    template: Mapping[str, Any] = optional(body, "chat_template_kwargs", dict, "an object") or {}
    for name in template:
        if name not in ("enable_thinking", "thinking", "thinking_budget"):
            raise refused(
                f"chat_template_kwargs.{name[:80]}",
                f"the template has no {name[:80]!r}: enable_thinking and thinking_budget are known",
                "unknown_parameter",
            )
    for name in ("enable_thinking", "thinking"):
        if (thinking := optional(template, name, bool, "true or false")) is None:
            continue
        mode: Mode = "think" if thinking else "nothink"
        if chosen.mode not in ("auto", mode):
            raise refused(f"chat_template_kwargs.{name}", f"{name} contradicts reasoning_effort or thinking")
        chosen = Reasoning(mode, chosen.budget)
    budgets = [b for b in (whole(body, "thinking_budget", 0), whole(template, "thinking_budget", 0)) if b is not None]
    if budgets:
        chosen = Reasoning(chosen.mode, min(budgets))
    return chosen


def _shown(value: Any) -> str:
    """A value, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
