"""The template engine: its dialect, its errors, and where a template is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phisight.chat_template import ChatTemplate, read_chat_template
from phisight.errors import TokenizerError


def render(source: str, content: str = "x", **options: Any) -> str:
    return ChatTemplate(source).render(
        [{"role": "user", "content": content}], add_generation_prompt=options.get("add_generation_prompt", False)
    )


def test_the_dialect() -> None:
    assert render("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "x!"
    assert render("{{ messages[0] | tojson }}", "<é'>") == '{"role": "user", "content": "<é\'>"}'
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{% if tools %}a{% else %}b{% endif %}{% if add_generation_prompt %}c{% endif %}") == "b"
    assert render("{{ '<b>' + messages[0].content }}", "<i>") == "<b><i>"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\nb\n{{ raise_exception('roles must\n alternate') }}", "line 3: roles must alternate"),
        ("a\n{% for %}", "line 2: not a valid template"),
        ("a\n{% generation %}b", "line 2: not a valid template"),
        ("a\n{{ messages[5]['content'] }}", "line 2: "),
        ("{{ bos_token }}", "line 1: 'bos_token' is undefined"),
        ("\n\n{{ 1 + 'a' }}", "line 3: "),
        ("{{ messages.append(1) }}", "line 1: "),
        ("{{ messages.__class__.__mro__ }}", "line 1: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "line 1: "),
        ("{% for i in range(1000000) %}{% endfor %}", "line 1: "),
        ("{% include 'other' %}", "line 1: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "line 1: "),
    ],
)
def test_errors_in_a_template_name_it_and_the_line(source: str, words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        render(source)
    assert str(caught.value).startswith("chat_template.jinja, " + words)
    assert "\n" not in str(caught.value)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert read_chat_template(tmp_path) is None
    config.write_text('{"chat_template": null}', encoding="utf-8")
    assert read_chat_template(tmp_path) is None
    config.write_text('{"chat_template": "in ü config"}', encoding="utf-8")
    assert read_chat_template(tmp_path) == "in ü config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert read_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}', encoding="utf-8")
    assert read_chat_template(tmp_path) == "processor"
    (tmp_path / "chat_template.jinja").write_text("file ü", encoding="utf-8")
    assert read_chat_template(tmp_path) == "file ü"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not valid JSON"),
        (b'{"chat_template": "\xff"}', "not UTF-8"),
        (b'{"chat_template": 3}', "neither a string nor a list"),
        (b'{"chat_template": ["x"]}', "neither a string nor a list"),
        (b'{"chat_template": [{"name": "rag", "template": "x"}]}', r'no template named "default" \(found: rag\)'),
    ],
)
def test_a_bad_entry_names_the_file(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: .*{words}"):
        read_chat_template(tmp_path)
