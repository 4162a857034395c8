"""The page in Chromium: ways to give it pictures, to bound a thought, to save what was said, without a mouse."""

from __future__ import annotations

import base64
import json
import os
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
PRICE = base64.b64encode((PICTURES / "price.png").read_bytes()).decode()
EVENTS = {
    "paste": "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})",
    "drop": "new DragEvent('drop', {dataTransfer: data, bubbles: true})",
}


@pytest.mark.parametrize("way", EVENTS)
def test_pictures_are_pasted_and_dropped(open_tab: Callable[..., Any], way: str) -> None:
    tab = open_tab()
    tab.js(f"""(() => {{
        const bytes = Uint8Array.from(atob('{PRICE}'), letter => letter.charCodeAt(0));
        const data = new DataTransfer();
        for (const name of ['one.png', 'two.png']) data.items.add(new File([bytes], name, {{type: 'image/png'}}));
        document.body.dispatchEvent({EVENTS[way]});
    }})()""")
    tab.until("document.querySelectorAll('.chip').length === 2")
    tab.until("document.getElementById('cost').innerText.startsWith('Together: 64 tokens')")
    assert tab.ask("What does the text say?")
    assert tab.js("document.querySelectorAll('.user img').length") == 2


def test_the_longest_thought_is_chosen(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    tab.js("""(() => {
        for (const [id, value, event] of [['thinking', 'think', 'change'], ['budget', 0, 'input']]) {
            document.getElementById(id).value = value;
            document.getElementById(id).dispatchEvent(new Event(event));
        }
    })()""")
    assert tab.js("document.getElementById('budget-told').innerText") == "64 tokens"
    body = tab.js("import('/page/chat.js').then(chat => chat.thinking('think', 64))")
    assert body == {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 64}
    tab.ask("How much is 3+53?")
    assert tab.js("document.querySelector('.thought').hidden") is False
    tab.js("document.getElementById('thinking').value = 'nothink'")
    tab.js("document.getElementById('thinking').dispatchEvent(new Event('change'))")
    assert tab.js("document.getElementById('budget').disabled")


def test_a_conversation_is_saved_with_its_pictures(open_tab: Callable[..., Any]) -> None:
    tab = open_tab()
    tab.add(PICTURES / "price.png")
    tab.ask("What does the text say?")
    saved = tab.js("""new Promise(resolve => {
        URL.createObjectURL = blob => (blob.text().then(resolve), 'blob:none');
        HTMLAnchorElement.prototype.click = () => {};
        document.getElementById('export-json').click();
    })""")
    [conversation] = json.loads(saved)["conversations"]
    asked, answered = conversation["turns"]
    assert asked["pictures"][0]["url"] == f"data:image/png;base64,{PRICE}"
    assert answered["text"] and answered["stats"]["images"] == 1


def test_everything_is_reached_without_a_mouse(open_tab: Callable[..., Any]) -> None:
    """From the question by Tab: each control in turn, and none is a trap."""
    tab = open_tab()
    tab.add(PICTURES / "chart.png")
    tab.js("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(25):
        tab.key("Tab")
        reached.append(tab.js("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    wanted = {"Detail of chart.png", "Find something in chart.png", "Remove chart.png"}
    wanted |= {"new", "export-all", "delete-all", "theme", "question", "add", "thinking", "budget", "send"}
    assert wanted <= set(reached)
    unnamed = tab.js("""[...document.querySelectorAll('button, input, select, textarea')].filter(control =>
        !control.textContent.trim() && !control.getAttribute('aria-label') && !control.labels?.length).length""")
    assert unnamed == 0
