"""Messages in OpenAI's form -> messages of the prompt builder, and where each picture is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from phisight.prompt import Message, user_message
from phisight.serve.errors import refused
from phisight.serve.settings import Limits

__all__ = ["Detail", "PictureRef", "read_messages"]

Detail = Literal["auto", "low", "high"]

FIELDS = frozenset({"role", "content", "reasoning_content", "tool_call_id"})

SAYS_NOTHING: Mapping[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],)}
"""Fields of answers that clients send back; null says nothing in any field."""


@dataclass(frozen=True)
class PictureRef:
    """A picture that a message names: its URL, and how closely to look. `where` is for messages.

    max_patches goes before the one of the request.
    """

    url: str
    detail: Detail
    where: str
    max_patches: int | None = None


def read_messages(value: Any, limits: Limits) -> tuple[tuple[Message, ...], tuple[PictureRef, ...]]:
    """The messages, and their pictures in order.

    A user message of pictures and one text becomes what the model was trained on, the pictures first, each with a
    newline; with several texts the order is kept. Raises ApiError.
    """
    if not isinstance(value, list) or not value:
        raise refused("messages", "messages is missing, empty or no list: give at least one message", "invalid_type")
    if len(value) > limits.messages:
        raise refused("messages", f"there are {len(value)} messages, at most {limits.messages} are taken")
    pictures: list[PictureRef] = []
    messages = [_message(entry, f"messages[{number}]", pictures) for number, entry in enumerate(value)]
    characters = sum(map(_characters, messages))
    if characters > limits.characters:
        raise refused(
            "messages",
            f"the messages have {characters} characters, at most {limits.characters} are taken: shorten them",
            "context_length_exceeded",
        )
    if len(pictures) > limits.images:
        raise refused(
            "messages",
            f"there are {len(pictures)} pictures, at most {limits.images} are taken: send fewer, or start the server "
            "with --max-images",
            "too_many_images",
        )
    return tuple(messages), tuple(pictures)


def _characters(message: Message) -> int:
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    thought = message.get("reasoning_content")
    return sum(map(len, parts)) + (len(thought) if isinstance(thought, str) else 0)


def _message(entry: Any, where: str, pictures: list[PictureRef]) -> Message:
    if not isinstance(entry, dict):
        raise refused(where, f"{where} is no object: give role and content", "invalid_type")
    for name, value in entry.items():
        if name not in FIELDS and value is not None and value not in SAYS_NOTHING.get(name, ()):
            raise refused(
                f"{where}.{name[:80]}",
                f"{where} has {name[:80]}, which is not known: leave it out",
                "unknown_parameter",
            )
    role = entry.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise refused(
            f"{where}.role", f"{where} has the role {str(role)[:80]!r}, wanted system, user, assistant or tool"
        )
    content = entry.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = _parts(content, f"{where}.content", pictures, only_text=role != "user")
    elif not isinstance(content, str):
        raise refused(f"{where}.content", f"{where}.content is neither a text nor a list of parts", "invalid_type")
    message = {"role": "system" if role == "developer" else role, "content": content}
    if entry.get("reasoning_content") is not None:
        message["reasoning_content"] = entry["reasoning_content"]
    return message


def _parts(parts: list[Any], where: str, pictures: list[PictureRef], *, only_text: bool) -> Any:
    texts: list[str] = []
    placed: list[dict[str, str]] = []
    images = 0
    for number, part in enumerate(parts):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            placed.append({"type": "text", "text": part["text"]})
        elif kind == "image_url" and not only_text:
            pictures.append(_picture(part.get("image_url"), f"{place}.image_url"))
            images += 1
            placed += [{"type": "image"}, {"type": "text", "text": "\n"}]
        else:
            wanted = "text" if only_text else "text or image_url"
            raise refused(place, f"{place} has the type {str(kind)[:80]!r}, wanted {wanted}", "invalid_type")
    if not placed:
        raise refused(where, f"{where} is empty: give a text or a picture")
    return user_message(texts[0], images)["content"] if images and len(texts) == 1 else placed


def _picture(value: Any, where: str) -> PictureRef:
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise refused(where, f'{where} is no object with a url, such as "data:image/png;base64,..."', "invalid_type")
    for name in value:
        if name not in ("url", "detail", "max_patches"):
            raise refused(f"{where}.{name[:80]}", f"{where} has {name[:80]}, which is not known", "unknown_parameter")
    most = value.get("max_patches")
    if most is not None and (type(most) is not int or most < 1):
        raise refused(
            f"{where}.max_patches", f"{where}.max_patches is {str(most)[:80]}, wanted a whole number, 1 or more"
        )
    asked = "auto" if value.get("detail") is None else value["detail"]
    for detail in get_args(Detail):
        if asked == detail:
            return PictureRef(value["url"], detail, where, most)
    raise refused(f"{where}.detail", f"{where}.detail is {str(asked)[:80]!r}, wanted auto, low or high")
