"""A checkpoint's chat template: messages to the text that the model was trained on.

Templates are jinja2 in the dialect of transformers' `apply_chat_template`: trim_blocks and lstrip_blocks,
loop controls, the `{% generation %}` tag (which marks the assistant's text for training and prints its body),
`raise_exception`, `strftime_now` and a `tojson` that does not escape HTML. They come with a download, so they
run in the sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phisight.errors import TokenizerError

__all__ = ["PLAIN_TEMPLATE", "ChatTemplate", "read_chat_template"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
"""The form of the Phi-4 family without newlines, for a checkpoint that has no template."""

COMPILED_FILE = "<template>"  # the file name that jinja2 gives to the frames of a template made from a string


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class UnprintableUndefined(Undefined):
    """An undefined variable may be tested, as templates do, but not printed: jinja2 would print nothing."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse its messages."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The local time in a `strftime` format."""
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, name: str = "chat_template.jinja") -> None:
        """Compile `source`; `name` is what errors call it.

        Raises TokenizerError with the line of a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=UnprintableUndefined,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        self._name = name
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TokenizerError(f"{name}, line {error.lineno}: not a valid template: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as text. `messages` have "role" and "content", both strings.

        Raises TokenizerError with the template's line for whatever fails inside it.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can fail in every way that an expression can
            raise TokenizerError(f"{self._name}, line {_template_line(error)}: {_one_line(error)}") from error


def _template_line(error: Exception) -> int | str:
    """The innermost line of the template in the traceback, which jinja2 has mapped to the source."""
    line: int | str = "unknown"
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == COMPILED_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_chat_template(directory: str | Path) -> str | None:
    """The source of a checkpoint's chat template, or None if it has none.

    It is `chat_template.jinja`, else the entry "chat_template" of `chat_template.json` (where processors kept it
    before) or `tokenizer_config.json`: a string, or a list of named templates, of which "default" is taken.
    Raises TokenizerError for a file that cannot be read or an entry of another form.
    """
    file = Path(directory) / "chat_template.jinja"
    if file.exists():
        return _read_text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = Path(directory) / name
        if file.exists() and (source := _read_entry(file)) is not None:
            return source
    return None


def _read_entry(file: Path) -> str | None:
    """The entry "chat_template" of a JSON file."""
    try:
        config = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from error
    entry = config.get("chat_template") if isinstance(config, dict) else None
    if entry is None or isinstance(entry, str):
        return entry
    if not isinstance(entry, list) or not all(isinstance(item, dict) for item in entry):
        raise TokenizerError(f"{file}: chat_template is neither a string nor a list of named templates")
    for item in entry:
        if item.get("name") == "default" and isinstance(item.get("template"), str):
            return str(item["template"])
    names = ", ".join(str(item.get("name")) for item in entry) or "none"
    raise TokenizerError(f'{file}: chat_template has no template named "default" (found: {names})')


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error
