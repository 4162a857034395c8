"""The page in Chromium: finding something in a picture, and how closely the server is to look at one."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

import phisight

pytest.importorskip("starlette")

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or os.name == "nt", reason="chromium is not installed, or has no pipes"
)

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
BUTTONS, CHART = PICTURES / "buttons.png", PICTURES / "chart.png"
SAVE = "click the Save button"


@pytest.fixture(scope="module")
def model() -> phisight.Model:
    return phisight.load("demo", threads=1)


@pytest.fixture
def tab(open_tab: Callable[..., Any]) -> Any:
    tab = open_tab()
    tab.js("document.getElementById('thinking').value = 'nothink'")
    return tab


def find(tab: Any, button: str, text: str = SAVE) -> None:
    """Click a picture's button, type what to find, and wait for the box."""
    before = tab.js("document.querySelectorAll('.place').length")
    tab.js(f"document.querySelector('{button}').click()")
    assert tab.js("document.getElementById('send').innerText") == "Find"
    tab.ask(text)
    tab.until(f"document.querySelectorAll('.place').length === {before + 1}")


def corners(tab: Any) -> list[float]:
    """The box and the dot where to click, in shares of the picture that is shown: x1, y1, x2, y2, x, y."""
    tab.until("[...document.querySelectorAll('.found img')].every(image => image.complete)")
    return list(
        tab.js("""(() => {
            const figure = document.querySelector('.found:has(.dot)');
            const whole = figure.querySelector('img').getBoundingClientRect();
            const box = figure.querySelector('rect').getBBox(), dot = figure.querySelector('.dot').getBBox();
            const svg = figure.querySelector('svg').getBoundingClientRect();
            if (Math.abs(svg.width - whole.width) > 1 || Math.abs(svg.height - whole.height) > 1) return [];
            return [box.x, box.y, box.x + box.width, box.y + box.height, dot.x, dot.y];
        })()""")
    )


def told(tab: Any) -> str:
    return str(tab.js("[...document.querySelectorAll('.place')].at(-1).innerText"))


def test_the_box_is_what_the_model_finds_alone(tab: Any, model: phisight.Model) -> None:
    found = model.ground(BUTTONS, SAVE, mode="nothink")
    tab.add(BUTTONS)
    find(tab, '.chip [aria-label="Find something in buttons.png"]')
    x, y = found.point
    left, top, right, bottom = found.pixels
    assert told(tab) == f"Click at {x}, {y}. The box is {left}, {top} to {right}, {bottom} of 128 × 128 pixels."
    assert corners(tab) == pytest.approx([*found.box, (x + 0.5) / 128, (y + 0.5) / 128], abs=1e-3)
    assert tab.js("document.querySelector('.user .said').innerText") == f"Find: {SAVE}"
    assert tab.js("document.querySelectorAll('.chip').length") == 0
    assert tab.js("document.getElementById('send').innerText") == "Send"


def test_a_turned_and_wide_picture_is_told_in_its_upright_pixels(tab: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(BUTTONS) as image:
        wide = image.convert("RGB").resize((300, 256), Image.Resampling.BICUBIC)
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    tab.add(tmp_path / "lying.png")
    find(tab, ".chip .plain")
    assert told(tab).endswith("of 300 × 256 pixels.")
    assert tab.until("document.querySelector('.found img').naturalWidth") == 300
    *_, x, y = corners(tab)
    assert 0.47 < x < 0.94 and 0.74 < y < 0.98  # the button at the lower right


def test_in_a_picture_of_the_conversation_and_on_from_there(tab: Any) -> None:
    """The other picture is not sent; what was found is part of the conversation, also after it was left."""
    tab.add(BUTTONS)
    tab.ask("What is here?")
    tab.add(CHART)
    find(tab, ".user .shown button")
    assert tab.js("document.querySelectorAll('.chip').length") == 1  # the chart waits for the next question
    before = corners(tab)
    tab.ask("And what is this?")
    saved = tab.js("""Promise.all([import('/page/store.js'), import('/page/save.js'), import('/page/chat.js')]).then(
        async ([store, save, chat]) => {
            const [kept] = await store.all();
            return [save.asMarkdown(kept), chat.messages(kept.turns)];
        })""")
    assert f"Find: {SAVE}" in saved[0] and "Click at " in saved[0]
    assert [len(message["content"]) for message in saved[1] if message["role"] == "user"] == [2, 1, 2]
    assert "Locate the UI element this instruction describes: click the Save button." in str(saved[1][2])
    tab.js("document.getElementById('new').click()")
    tab.js("document.querySelector('#list .title').click()")
    tab.until("document.querySelectorAll('.place').length === 1")
    assert corners(tab) == before


def test_leaving_it_and_typing_nothing(tab: Any) -> None:
    tab.add(BUTTONS, CHART)
    shown = "[...document.querySelectorAll('.chip')].map(chip => !chip.hidden)"
    tab.js("document.querySelector('.chip .plain').click()")
    assert tab.js(shown) == [True, False]  # what is not sent now
    tab.key("Enter")
    assert "what is to be found" in tab.until("document.getElementById('wrong')?.innerText")
    tab.key("Escape")
    assert tab.js("document.getElementById('finding').hidden && document.getElementById('send').innerText") == "Send"
    assert tab.js(shown) == [True, True]
    tab.js("document.querySelector('.chip .plain').click()")
    assert not tab.js("document.getElementById('finding').hidden")
    tab.js("""document.querySelector('.chip [aria-label="Remove buttons.png"]').click()""")
    assert tab.js("document.getElementById('finding').hidden")


def test_what_was_not_found_returns_to_where_it_was_asked(tab: Any, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:-30])
    tab.add(tmp_path / "cut.png")
    tab.js("document.querySelector('.chip .plain').click()")
    tab.type(SAVE)
    tab.key("Enter")
    assert "not answered" in tab.until("document.getElementById('wrong')?.innerText")
    tab.until("!document.getElementById('finding').hidden")
    assert tab.js("document.getElementById('question').value") == SAVE
    assert tab.js("document.querySelectorAll('.chip').length") == 1


# how closely it looks


def test_the_slider_sets_what_a_picture_costs(tab: Any, model: phisight.Model) -> None:
    tokens = "Number(/\\d+/.exec(document.querySelector('.chip .soft').innerText)[0])"
    least = model.budget.min_patches
    tab.add(CHART)
    full = tab.js(tokens)
    assert full > least

    def slide(step: int) -> None:
        tab.js(f"""(() => {{
            const slider = document.querySelector('.chip input');
            slider.value = {step};
            slider.dispatchEvent(new Event('input'));
        }})()""")

    slide(0)
    fewest = tab.until(f"{tokens} < {full} && {tokens}")
    assert fewest <= least
    slide(8)
    tab.until(f"{fewest} < {tokens} && {tokens} < {full}")
    slide(16)
    tab.until(f"{tokens} === {full}")
    slide(0)
    tab.until(f"{tokens} === {fewest}")
    tab.ask("What is here?")
    stages = tab.js("document.querySelector('.stages').textContent")
    assert re.search(rf"Pictures looked at.*? s{fewest} tokens", stages), stages
    tab.ask("And what else?")  # the picture is as it was, and so remembered
    stages = tab.js("[...document.querySelectorAll('.stages')].at(-1).textContent")
    assert f"{fewest} tokens, 1 of them seen before" in stages, stages
    tab.add(CHART, BUTTONS)
    tab.js("""(() => {
        const slider = document.querySelector('.chip input');
        slider.value = 0;
        slider.dispatchEvent(new Event('input'));
    })()""")
    tab.until(f"document.getElementById('cost').innerText.startsWith('Together: {fewest + 64} tokens, ')")


def test_a_picture_that_cannot_be_cheaper_has_no_slider(tab: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    tab.add(tmp_path / "small.png", CHART)
    shown = tab.js("[...document.querySelectorAll('.chip .detail')].map(label => !label.hidden)")
    assert shown == [False, True]
