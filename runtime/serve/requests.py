"""A chat request: OpenAI's JSON -> what is asked of the model, checked as a whole before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from phisight.constraint import Constraint
from phisight.constraint_llguidance import is_installed
from phisight.errors import InputError
from phisight.grounding import BOX
from phisight.logprobs import MOST_ALTERNATIVES
from phisight.options import GenerateOptions
from phisight.prompt import Message, Mode
from phisight.serve.errors import ApiError, api_error, refused
from phisight.serve.messages import PictureRef, read_messages
from phisight.serve.parameters import boolean, check_known, optional, reasoning, stop_texts, token_limit, whole
from phisight.serve.settings import ServeSettings

__all__ = ["ChatRequest", "read_chat"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class ChatRequest:
    """What is asked. `include_usage` sends the usage as a last event."""

    model: str
    messages: tuple[Message, ...]
    pictures: tuple[PictureRef, ...]
    options: GenerateOptions
    mode: Mode
    max_patches: int | None
    stream: bool
    include_usage: bool

    @property
    def wants_box(self) -> bool:
        """Whether the answer is a box in the one picture of the request."""
        return self.options.constraint == BOX


def read_chat(body: Mapping[str, Any], settings: ServeSettings, defaults: GenerateOptions) -> ChatRequest:
    """Read the body of /v1/chat/completions; `defaults` are the model's. Raises ApiError."""
    check_known(body)
    _check_only_value(body, "n", 1, "one answer is given to a request: ask again for another")
    messages, pictures = read_messages(body.get("messages"), settings.limits)
    thinking = reasoning(body)
    stream = boolean(body, "stream")
    asked = ChatRequest(
        model=model_name(body, settings),
        messages=messages,
        pictures=pictures,
        options=_options(body, defaults, settings.limits.max_tokens, thinking.budget),
        mode=thinking.mode,
        max_patches=whole(body, "max_patches", 1),
        stream=stream,
        include_usage=_include_usage(body, stream),
    )
    if asked.wants_box and len(pictures) != 1:
        raise refused("response_format", f"a box lies in one picture, there are {len(pictures)}: send exactly one")
    return asked


def model_name(body: Mapping[str, Any], settings: ServeSettings) -> str:
    """The name by which the model is asked for. Raises ApiError with status 404 for one that it does not have."""
    asked: str | None = optional(body, "model", str, "the model's name")
    name = settings.names[0] if asked is None else asked
    if name not in settings.names:
        known = ", ".join(settings.names)
        raise ApiError(404, f"there is no model {name[:200]!r} here: ask for {known}", "model", "model_not_found")
    return name


def _options(
    body: Mapping[str, Any], defaults: GenerateOptions, most_tokens: int | None, budget: int | None
) -> GenerateOptions:
    changes: dict[str, Any] = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    changes |= {"max_tokens": token_limit(body, most_tokens), "stop": stop_texts(body)}
    changes |= {"thinking_budget": budget, "constraint": _constraint(body), "logprobs": _logprobs(body)}
    try:
        return replace(defaults, **changes)
    except InputError as error:  # it begins with the field's name
        raise api_error(error, str(error).partition(" ")[0]) from None


def _check_only_value(body: Mapping[str, Any], name: str, value: Any, reason: str) -> None:
    found = body.get(name)
    if found is not None and (found != value or type(found) is not type(value)):
        raise refused(name, f"{name} is {str(found)[:80]}, wanted {str(value).lower()}: {reason}", "unsupported_value")


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """How many alternatives are told with each token; None: not even its own probability."""
    likeliest = whole(body, "top_logprobs", 0, MOST_ALTERNATIVES)
    if boolean(body, "logprobs"):
        return likeliest or 0
    if likeliest:
        raise refused("top_logprobs", f"top_logprobs is {likeliest} without logprobs: set logprobs to true")
    return None


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options: Mapping[str, Any] = optional(body, "stream_options", dict, "an object") or {}
    if options and not stream:
        raise refused("stream_options", "stream_options is given without stream: set stream to true")
    for name in options:
        if name not in (
            "include_usage",
            "include_obfuscation",
        ):  # the latter: padding
            raise refused(f"stream_options.{name[:80]}", f"stream_options has no {name[:80]!r}", "unknown_parameter")
    return boolean(options, "include_usage")


def _constraint(body: Mapping[str, Any]) -> Constraint | None:
    """The form that response_format asks for. A schema is compiled later, before the request is queued."""
    form: Mapping[str, Any] | None = optional(body, "response_format", dict, "an object with a type")
    if form is None:
        return None
    if form.get("type") in ("json_object", "json_schema", "box") and not is_installed():
        raise refused(
            "response_format",
            'this server has no llguidance, which response_format needs: pip install "phisight[schema]" there',
            "unsupported_parameter",
        )
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint.json_object()
        case "box":
            return BOX
        case "json_schema":
            wrapped = optional(form, "json_schema", dict, "an object with a schema")
            schema = None if wrapped is None else wrapped.get("schema")
            if not isinstance(schema, dict):
                raise refused(
                    "response_format.json_schema.schema",
                    "the schema is missing or no object",
                    "invalid_type",
                )
            try:
                return Constraint.json_schema(schema)
            except InputError as error:
                raise api_error(error, "response_format.json_schema.schema") from None
        case kind:
            raise refused(
                "response_format.type",
                f"response_format.type is {str(kind)[:80]!r}, wanted text, json_object, json_schema or box",
            )
