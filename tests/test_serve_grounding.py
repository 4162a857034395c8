"""Finding something in a picture through the server, and how closely it looks: forms, coordinates, budgets."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

import phisight

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
BUTTONS, CHART = PICTURES / "buttons.png", PICTURES / "chart.png"
SAVE = "click the Save button"
BOX = {"type": "box"}


def picture(file: Path | bytes, **more: Any) -> dict[str, Any]:
    data = base64.b64encode(file if isinstance(file, bytes) else file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **more}}


def turned() -> bytes:
    """The buttons, larger and wider, stored lying with the orientation that makes them upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    with Image.open(BUTTONS) as image:
        wide = image.convert("RGB").resize((300, 256), Image.Resampling.BICUBIC)
    wide.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def client(serve: Callable[..., Any]) -> Any:
    return serve().client()


def ask(client: Any, text: str, *pictures: dict[str, Any], **options: Any) -> Any:
    content = [*pictures, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="demo", messages=messages, **{"temperature": 0} | options)


@pytest.fixture(scope="module")
def find(client: Any) -> Callable[..., Any]:
    prompt = client.models.retrieve("demo").grounding_prompt
    return lambda *pictures, **options: ask(
        client, prompt.format(SAVE), *pictures, **{"response_format": BOX} | options
    )


@pytest.mark.parametrize("file", [BUTTONS, turned()], ids=["as it is", "turned"])
def test_a_box_is_what_the_model_finds(find: Callable[..., Any], file: Path | bytes) -> None:
    answer = find(picture(file, max_patches=64))
    alone = phisight.load("demo", threads=1).ground(file, SAVE, max_patches=64)
    found = answer.phisight["grounding"]
    assert answer.choices[0].message.content == alone.answer.text
    assert tuple(found["box"]) == alone.box
    assert tuple(found["pixels"]) == alone.pixels
    assert tuple(found["point"]) == alone.point
    assert (found["width"], found["height"]) == ((128, 128) if file == BUTTONS else (300, 256))
    column, row = found["point"]
    assert (0.47 < column / found["width"] < 0.94) and (0.74 < row / found["height"] < 0.98)  # the button


def test_a_stream_tells_the_box_at_its_end(find: Callable[..., Any]) -> None:
    whole = find(picture(BUTTONS))
    *_, last = find(picture(BUTTONS), stream=True)
    assert last.phisight["grounding"] == whole.phisight["grounding"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_is_a_box(find: Callable[..., Any], seed: int) -> None:
    options = {"temperature": 10, "top_p": 1, "seed": seed, "extra_body": {"thinking_budget": 4}}
    found = find(picture(BUTTONS), **options).phisight["grounding"]
    x1, y1, x2, y2 = found["box"]
    assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1


def test_a_box_that_was_cut_is_none_and_that_is_said(find: Callable[..., Any]) -> None:
    answer = find(picture(BUTTONS), max_tokens=4, reasoning_effort="none")
    assert answer.choices[0].finish_reason == "length"
    assert answer.phisight["grounding"] is None
    assert any("cut by the limit of tokens" in note for note in answer.phisight["notes"])


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_box_needs_one_picture(find: Callable[..., Any], pictures: int) -> None:
    with pytest.raises(openai.BadRequestError, match=f"there are {pictures}"):
        find(*[picture(BUTTONS)] * pictures)


def test_an_answer_that_is_no_box_has_none(client: Any) -> None:
    assert "grounding" not in ask(client, "What is here?", picture(BUTTONS), max_tokens=2).phisight


# how closely it looks


def test_the_budget_is_told_and_each_picture_has_its_own(client: Any, serve: Callable[..., Any]) -> None:
    told = client.models.retrieve("demo")
    budget = phisight.load("demo", threads=1).budget
    assert (told.min_patches, told.max_patches) == (budget.min_patches, budget.max_patches)

    def tokens(*pictures: dict[str, Any], **body: Any) -> int:
        details = ask(client, "?", *pictures, max_tokens=1, extra_body=body).usage.prompt_tokens_details
        return int(details.image_tokens)

    least, full = tokens(picture(CHART, max_patches=told.min_patches)), tokens(picture(CHART))
    assert least <= told.min_patches < full
    assert tokens(picture(CHART, max_patches=told.min_patches), picture(CHART)) == least + full
    few = {"max_patches": told.min_patches}
    assert tokens(picture(CHART, max_patches=told.max_patches), picture(CHART), **few) == full + least
    assert tokens(picture(CHART, detail="low", max_patches=told.max_patches)) == least


@pytest.mark.parametrize(("most", "said"), [(0, "1 or more"), (True, "1 or more"), ("x", "1 or more"), (10**6, "1 to")])
def test_a_budget_that_cannot_be(client: Any, most: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        ask(client, "?", picture(CHART, max_patches=most))
    assert refused.value.param == "messages[0].content[0].image_url.max_patches"
