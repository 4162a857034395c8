"""The page in Chromium: conversations, stopping, mistakes, tabs, looks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phisight

pytest.importorskip("starlette")

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or os.name == "nt", reason="chromium is not installed, or has no pipes"
)

PICTURES = Path(phisight.__file__).parent / "demo/pictures"


def test_a_conversation_with_a_picture(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    tab.js("document.getElementById('thinking').value = 'nothink'")
    tab.add(PICTURES / "price.png")
    tokens = re.search(r"\d+ tokens", tab.js("document.querySelector('.chip').innerText"))
    assert tokens
    assert "$" in tab.ask("What does the text say?")
    assert f"Pictures looked at{tokens[0]}" in re.sub(
        r"[\d.]+ s|under 0.1 s", "", tab.js("document.querySelector('.stages').textContent")
    )
    assert tab.js("document.querySelector('.user img').naturalWidth") > 0
    assert tab.ask("And what is it once more?")
    stages = tab.js("[...document.querySelectorAll('.stages')].at(-1).textContent")
    assert "remembered from before" in stages
    tab.add(PICTURES / "chart.png")
    told = tab.js("document.querySelector('.chip').innerText")
    assert re.search(r"tokens, .*\d (s|min)", told)  # the first answers have shown the times


def test_a_thought_is_folded_and_a_box_is_drawn(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    tab.js("document.getElementById('thinking').value = 'think'")
    tab.add(PICTURES / "chart.png")
    tab.ask("What is the value of the orange bar?")
    assert tab.js("document.querySelector('.thought').open") is False
    assert tab.js("document.querySelector('.thought summary').innerText").startswith("Thought for")
    assert tab.js("document.querySelector('.thought p').textContent")

    drawn = tab.js("""import('/page/boxes.js').then(({boxesIn, drawn}) => {
        const figure = drawn({url: '', name: 'x'}, boxesIn('at [0.5, 0.2, 0.1, .4] and [1, 2, 3, 4]'));
        return [...figure.querySelectorAll('rect')].map(
            r => ['x', 'y', 'width', 'height'].map(a => Number(r.getAttribute(a))));
    })""")
    assert drawn == [pytest.approx([0.1, 0.2, 0.4, 0.2])]


def test_a_box_over_the_picture(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    tab.js("document.getElementById('thinking').value = 'nothink'")
    tab.add(PICTURES / "buttons.png")
    said = tab.ask(
        "Locate the UI element this instruction describes: click the save button. Output its bbox coordinates using "
        "the format of [x1, y1, x2, y2] using relative coordinates from 0.0000 to 1.0000."
    )
    box_said = json.loads(said)
    assert tab.until("document.querySelector('.found img').complete")
    image, box = tab.js(
        "['.found img', '.found rect'].map(s => document.querySelector(s).getBoundingClientRect().toJSON())"
    )
    assert box["left"] == pytest.approx(image["left"] + box_said[0] * image["width"], abs=3)
    assert box["bottom"] == pytest.approx(image["top"] + box_said[3] * image["height"], abs=3)


def test_stopping_frees_the_server(open_tab: Callable[..., Any], served: Any) -> None:
    tab = open_tab()
    with served.slowly():
        tab.type("How much is 3+53?")
        tab.key("Enter")
        tab.until("document.querySelector('.assistant')?.textContent.length > 60")
        assert tab.js("document.getElementById('send').hidden")
        tab.key("Escape")
        tab.until("document.getElementById('stop').hidden")
        served.until_idle(10)
        assert "Stopped." in tab.js("document.querySelector('.assistant').innerText")
        tab.type("And 7+8?")
        tab.key("Enter")
        tab.until("document.querySelectorAll('.assistant')[1]?.textContent.length > 60")
        tab.js("document.getElementById('new').click()")  # so does leaving, and what came is kept
        tab.until("document.getElementById('stop').hidden")
        assert tab.js("document.querySelectorAll('.turn').length") == 0
    assert tab.ask("How much is 2+2?")


def test_a_bad_picture_is_named_and_the_question_kept(open_tab: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (tmp_path / "notes.txt").write_text("no picture")
    tab = open_tab()
    tab.add(tmp_path / "broken.png")
    tab.type("What is this?")
    tab.key("Enter")
    told = tab.until("document.getElementById('wrong')?.innerText")
    assert "not answered" in told
    assert "image" in told or "picture" in told
    tab.until("document.querySelectorAll('.chip').length === 1")
    assert tab.js("document.getElementById('question').value") == "What is this?"
    tab.js("""document.querySelector('.chip [aria-label="Remove broken.png"]').click()""")
    tab.js("""import('/page/pictures.js').then(() => {
        const data = new DataTransfer();
        data.items.add(new File(['x'], 'notes.txt', {type: 'text/plain'}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
    })""")
    assert "notes.txt is no picture" in tab.until("document.getElementById('wrong')?.innerText")
    tab.js("document.getElementById('question').value = ''")
    assert tab.ask("How much is 1+1?")


def test_two_tabs_and_the_history(open_tab: Callable[..., Any]) -> None:
    one, two = open_tab(), open_tab()
    one.ask("How much is 11+22?")
    two.ask("How much is 5+6?")
    titles = "[...document.querySelectorAll('#list .title')].map(b => b.innerText)"
    for tab in (one, two):
        tab.until(f"['How much is 11+22?', 'How much is 5+6?'].every(t => {titles}.includes(t))")
        assert tab.js("document.querySelectorAll('.user').length") == 1
    two.js("[...document.querySelectorAll('#list .title')].find(b => b.innerText.includes('11+22')).click()")
    two.until("document.querySelector('.user .said').innerText.includes('11+22')")
    two.ask("And 1+1?")
    one.until("document.querySelectorAll('.user').length === 2")  # the other tab went on with the same conversation
    saved = one.js("""Promise.all([import('/page/store.js'), import('/page/save.js')]).then(
        async ([store, save]) => save.asMarkdown((await store.all()).find(c => c.title.includes('11+22'))))""")
    assert saved.startswith("# How much is 11+22?")
    assert "And 1+1?" in saved
    one.js("window.confirm = () => true; document.getElementById('delete-all').click()")
    two.until("document.querySelectorAll('#list li').length === 0")


def test_a_long_answer_stays_readable(open_tab: Callable[..., Any], served: Any) -> None:
    tab = open_tab(width=390, height=800)
    with served.slowly(0.0):
        tab.type("How much is 3+53?")
        tab.key("Enter")
        tab.until(
            "document.querySelector('.assistant')?.textContent.length > 900 || !!document.querySelector('.stages')"
        )
        tab.key("Escape")
        tab.until("document.getElementById('stop').hidden")
    assert tab.js("document.documentElement.scrollWidth") <= 390
    assert tab.js("document.getElementById('turns').scrollWidth") <= 390


def test_markup_in_an_answer_stays_text(open_tab: Callable[..., Any]) -> None:
    text = (
        "# Title\n\n<img src=x onerror=alert(1)> **bold** `a<b` *it*\n- one\n- two\n\n1. first\n\n> said\n\n"
        "|a|b|\n|-|-|\n|1|2|\n\n```\n**code**\n```\n[link](https://example.org) ![p](https://example.org/p.png)"
    )
    tags, told = open_tab().js(f"""import('/page/markdown.js').then(({{markdown}}) => {{
        const made = document.createElement('div');
        made.append(...markdown({json.dumps(text)}));
        return [[...made.querySelectorAll('*')].map(n => n.localName), made.textContent];
    }})""")
    assert not {"img", "a", "script", "iframe"} & set(tags)
    assert {"h3", "strong", "em", "code", "ul", "ol", "li", "blockquote", "table", "pre"} <= set(tags)
    assert "<img src=x onerror=alert(1)>" in told
    assert "**code**" in told


def test_a_key_is_asked_for(open_tab: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = open_tab(serve(api_keys=("right",)).url)
    for key in ("wrong", "right"):
        tab.until("document.querySelector('dialog').open")
        tab.js(f"document.getElementById('key').value = '{key}'; document.querySelector('dialog button').click()")
    tab.until("document.getElementById('model').innerText === 'demo'")
    assert tab.ask("How much is 1+1?")


def test_light_dark_and_by_hand(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    for scheme, light in (("light", True), ("dark", False)):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert (tab.js(ground) > 128) == light
    tab.js("document.getElementById('theme').click()")
    assert tab.js(ground) > 128
    assert tab.js("localStorage.getItem('phisight-theme')") == "light"
    tab.js("localStorage.clear()")
