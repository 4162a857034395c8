"""JSON schemas of a chat request and its answer: the forms that `requests`, `parameters` and `messages` accept.

What a schema cannot say is said in its description: parameters that need or exclude each other, and what of a picture
is found only when it is opened.
"""

from __future__ import annotations

from typing import Any, get_args

from phisight.config import ImageBudget
from phisight.logprobs import MOST_ALTERNATIVES
from phisight.serve.messages import FIELDS, SAYS_NOTHING, Detail
from phisight.serve.parameters import CHANGES_NOTHING, EFFORTS, HARMLESS, LONGEST_STOP, MOST_STOPS
from phisight.serve.settings import Limits, ServeSettings

__all__ = ["chat_schemas"]

NULL = {"type": "null"}

SMALL_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQAAAAA3iMLMAAAAFElEQVR4nGNgQAL8H5gYGDARMgAAI20BDlccGQIAAAAA"
    "SUVORK5CYII="
)
"""A picture that may stand for any, for the document's readers to try."""


def chat_schemas(settings: ServeSettings, budget: ImageBudget | None) -> dict[str, Any]:
    """By name. `budget` None: a model without pictures."""
    return {
        "ChatRequest": _object(_parameters(settings, budget), "messages", others=NULL),
        "Message": {"anyOf": _messages()},
        "TextPart": _part("text", _TEXT),
        "PicturePart": _part("image_url", _picture(budget)),
        "ResponseFormat": _RESPONSE_FORMAT,
        "ChatCompletion": _answer("chat.completion", "message"),
        "ChatCompletionChunk": _answer("chat.completion.chunk", "delta"),
    }


def _parameters(settings: ServeSettings, budget: ImageBudget | None) -> dict[str, Any]:
    limits: Limits = settings.limits
    taken = {
        "model": _or_null("string", enum=[*settings.names, None]),
        "messages": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Message"},
            "minItems": 1,
            "maxItems": limits.messages,
            "description": f"At most {limits.images} pictures and {limits.characters} characters in all",
        },
        "max_tokens": _or_null("integer", minimum=1, description="Most tokens of thought and answer together"),
        "max_completion_tokens": _or_null("integer", minimum=1, description="The same; give one of them"),
        "temperature": _or_null("number", minimum=0),
        "top_p": _or_null("number", exclusiveMinimum=0, maximum=1),
        "top_k": _or_null("integer", minimum=1),
        "min_p": _or_null("number", minimum=0, maximum=1),
        "repetition_penalty": _or_null("number", exclusiveMinimum=0),
        "seed": _or_null("integer", minimum=0),
        "stop": {
            "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}, NULL],
            "description": "Texts that end the answer; they are not in it",
        },
        "stream": _or_null("boolean"),
        "stream_options": _object(
            {"include_usage": _or_null("boolean"), "include_obfuscation": {}},
            kind=["object", "null"],
            description="With stream only",
        ),
        "n": {"enum": [1, None]},
        "response_format": {"anyOf": [{"$ref": "#/components/schemas/ResponseFormat"}, NULL]},
        "logprobs": _or_null("boolean"),
        "top_logprobs": _or_null("integer", minimum=0, maximum=MOST_ALTERNATIVES, description="With logprobs only"),
        "reasoning_effort": _or_null("string", enum=[*EFFORTS, None]),
        "chat_template_kwargs": _object(
            {
                "enable_thinking": _or_null("boolean"),
                "thinking": _or_null("boolean"),
                "thinking_budget": _or_null("integer", minimum=0),
            },
            kind=["object", "null"],
            description="Must not contradict reasoning_effort",
        ),
        "thinking_budget": _or_null("integer", minimum=0, description="Most tokens of the thought"),
        "max_patches": _patches(budget, "Most patches of each picture"),
    }
    nothing = {
        name: {"enum": [*values, None], "description": "Changes nothing; another value is refused"}
        for name, values in CHANGES_NOTHING.items()
    }
    return taken | nothing | {name: {"description": "Ignored"} for name in sorted(HARMLESS)}


def _or_null(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


def _object(
    properties: dict[str, Any], *required: str, kind: Any = "object", others: Any = False, **more: Any
) -> dict[str, Any]:
    """`others`: what properties with other names may be; False: there may be none."""
    needed = {"required": list(required)} if required else {}
    return {"type": kind, "properties": properties, "additionalProperties": others, **needed, **more}


def _part(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"type": {"const": kind}, kind: schema}, "required": ["type", kind]}


def _patches(budget: ImageBudget | None, description: str) -> dict[str, Any]:
    most = {} if budget is None else {"maximum": budget.max_patches}
    return _or_null("integer", minimum=1, **most, description=description)


def _picture(budget: ImageBudget | None) -> dict[str, Any]:
    url = {
        "type": "string",
        "description": "data:image/png;base64,... or an address on one of the hosts that the server allows",
        "examples": [SMALL_PICTURE],
    }
    detail = {"enum": [*get_args(Detail), None]}
    return _object({"url": url, "detail": detail, "max_patches": _patches(budget, "Most patches of this one")}, "url")


def _messages() -> list[dict[str, Any]]:
    return [
        _message(("user",), ("TextPart", "PicturePart")),
        _message(("system", "developer", "tool"), ("TextPart",)),
        _message(("assistant",), ("TextPart",), reasoning_content={"type": ["string", "null"]}),
    ]


def _message(roles: tuple[str, ...], parts: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """`more`: fields that mean something to these roles alone."""
    items = [{"$ref": f"#/components/schemas/{part}"} for part in parts]
    content = [{"type": "string"}, {"type": "array", "items": {"anyOf": items}, "minItems": 1}]
    required = ["role", "content"]
    if "assistant" in roles:
        content.append(NULL)
        required.remove("content")
    nothing = {name: {"enum": [*values, None]} for name, values in SAYS_NOTHING.items()}
    fields = {name: {"description": "Ignored"} for name in sorted(FIELDS)} | nothing | more
    fields |= {"role": {"enum": list(roles)}, "content": {"anyOf": content}}
    return _object(fields, *required, others=NULL)


_TEXT = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}

_RESPONSE_FORMAT = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object", "box"]}},
            "required": ["type"],
            "description": "box: [x1, y1, x2, y2] in shares of the sides; needs exactly one picture",
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "schema": {
                            "type": "object",
                            "description": "As llguidance compiles it, else it is refused",
                            "examples": [{"type": "object"}, {"enum": ["yes", "no"]}, {"type": "integer"}],
                        }
                    },
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}

_TOKEN = {
    "type": "object",
    "properties": {
        "token": _TEXT,
        "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        "logprob": {"type": "number", "maximum": 0},
    },
    "required": ["token", "bytes", "logprob"],
}
_LOGPROBS = {
    "type": ["object", "null"],
    "properties": {
        "content": {
            "type": "array",
            "items": {
                "allOf": [_TOKEN],
                "properties": {"top_logprobs": {"type": "array", "items": _TOKEN, "maxItems": MOST_ALTERNATIVES}},
                "required": ["top_logprobs"],
            },
        }
    },
    "required": ["content"],
}


def _answer(kind: str, said: str) -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    choice = {
        "type": "object",
        "properties": {
            "index": {"const": 0},
            said: {"type": "object", "properties": {"content": text, "reasoning_content": text}},
            "finish_reason": {"enum": ["stop", "length", None]},
            "logprobs": _LOGPROBS,
        },
        "required": ["index", said, "finish_reason", "logprobs"],
    }
    count = {"type": "integer", "minimum": 0}
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), count)
    usage = {"type": ["object", "null"], "properties": counts, "required": list(counts)}
    fields = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": count,
        "model": _TEXT,
        "choices": {"type": "array", "items": choice, "maxItems": 1},
    }
    return {"type": "object", "properties": fields | {"usage": usage}, "required": list(fields)}
