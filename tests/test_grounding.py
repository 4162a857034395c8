"""Where a control is: the official prompt, the form of a box, pixels of the upright original."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image

import phisight
from phisight.answer import Answer
from phisight.constraint import Constraint
from phisight.constraint_llguidance import Compiler
from phisight.errors import AnswerError, Cancelled, EngineError, InputError
from phisight.grounding import BOX, Grounding, locate
from phisight.model import Model
from phisight.tasks import sample
from phisight.tasks.question import Box, centre_inside

DEMO = Path(phisight.__file__).parent / "demo"
BUTTONS = DEMO / "pictures/buttons.png"
SAVE = "click the Save button"


@pytest.fixture(scope="module")
def model() -> Model:
    return phisight.load("demo", threads=1)


@pytest.fixture(scope="module")
def answer(model: Model) -> Answer:
    """Any answer, whose text a test replaces."""
    return model.generate("Hello", options=model.options(max_tokens=1, temperature=0))


def samples(count: int) -> list[tuple[NDArray[np.uint8], str, Box]]:
    """Drawn interfaces, of no training, with an instruction and the true box."""
    found = []
    for seed in itertools.islice(itertools.count(70_000), count):
        drawn = sample("ground", seed)
        match = re.search(r"(?:describes|Locate): (.+?)\.", drawn.question.text)
        assert match is not None and drawn.question.box is not None
        found.append((drawn.pictures[0], match[1], drawn.question.box))
    return found


def turned(pixels: NDArray[np.uint8], orientation: int) -> bytes:
    """A file that stores a picture turned, with the EXIF orientation that makes it upright."""
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).transpose(back[orientation]).save(file, format="PNG", exif=exif)
    return file.getvalue()


def hits(found: Grounding, true: Box) -> bool:
    """Whether a click on the point in the upright picture lies in the control."""
    column, row = found.point
    return true[0] <= (column + 0.5) / found.width <= true[2] and true[1] <= (row + 0.5) / found.height <= true[3]


def test_the_buttons_picture(model: Model) -> None:
    found = model.ground(BUTTONS, SAVE)
    assert (found.width, found.height) == (128, 128)
    left, top, right, bottom = found.pixels
    column, row = found.point
    assert left < column < right and top < row < bottom
    assert 60 < column < 120 and 95 < row < 125  # the button at the lower right
    assert found.notes == ()


@pytest.mark.parametrize("way", ["as it is", "enlarged", "turned"])
def test_controls_are_hit_in_the_pixels_of_the_original(model: Model, way: str) -> None:
    """Resized to another shape, or stored turned: the click still lands in the control."""
    right = 0
    drawn = samples(20)
    for number, (pixels, instruction, true) in enumerate(drawn):
        height, width = pixels.shape[:2]
        if way == "enlarged":
            image = Image.fromarray(pixels).resize((3 * width + number, 3 * height), Image.Resampling.BICUBIC)
            found = model.ground(image, instruction, max_patches=(height // 16) * (width // 16))
            assert (found.width, found.height) == image.size
        else:
            source = pixels if way == "as it is" else turned(pixels, (3, 6, 8)[number % 3])
            found = model.ground(source, instruction)
            assert (found.width, found.height) == (width, height)
        right += hits(found, true)
    assert right > 0.9 * len(drawn)


def test_a_turned_file_gives_the_box_of_the_upright_picture(model: Model) -> None:
    pixels, instruction, _ = samples(1)[0]
    upright = model.ground(pixels, instruction)
    for orientation in (3, 6, 8):
        assert model.ground(turned(pixels, orientation), instruction).pixels == upright.pixels


def test_llama_cpp_grounds_as_well(exported_gguf: Callable[..., Path], model: Model) -> None:
    pytest.importorskip("llama_cpp")
    llama = phisight.load(exported_gguf(DEMO / "checkpoint", decoder="F32"), threads=1)
    drawn = samples(6)
    right = sum(centre_inside(llama.ground(pixels, instruction).box, true) for pixels, instruction, true in drawn)
    assert right >= 5


@pytest.mark.parametrize("temperature", [1, 10])
def test_whatever_is_drawn_is_a_box_in_the_picture(model: Model, temperature: float) -> None:
    for seed in range(15):
        options = model.options(temperature=temperature, top_p=1, seed=seed, thinking_budget=4)
        found = model.ground(BUTTONS, SAVE, options=options)
        assert re.fullmatch(r"\[[\d., ]+\]", found.answer.text)
        x1, y1, x2, y2 = found.box
        assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("[0.1234, 0.5000, 0.9999, 1.0000]", True),
        ("[0.12,0.50,0.99,1.00]", True),
        ("[0, 0, 1, 1]", True),
        ("[0.12, 0.50, 0.99, 1.01]", False),
        ("[0.12, 0.50, 0.99]", False),
        ("[-0.1, 0.50, 0.99, 1]", False),
        ("[0.12345, 0.50, 0.99, 1]", False),
        ("The box is [0, 0, 1, 1]", False),
    ],
)
def test_the_form_of_a_box(model: Model, text: str, fits: bool) -> None:
    end = model.tokenizer.id_of("<|im_end|>")
    assert end is not None
    matcher = Compiler(model.tokenizer, frozenset({end})).compile(BOX)
    try:
        for token_id in model.tokenizer.encode(text, parse_special=False):
            matcher.advance(token_id)
    except EngineError:
        assert not fits
    else:
        assert matcher.complete == fits


@given(st.tuples(*[st.integers(0, 100)] * 4), st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_lie_in_the_picture_and_the_point_in_the_box(
    answer: Answer, shares: tuple[int, int, int, int], width: int, height: int
) -> None:
    text = "[" + ", ".join(f"{share / 100:.2f}" for share in shares) + "]"
    found = locate(replace(answer, text=text), (width, height))
    left, top, right, bottom = found.pixels
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    column, row = found.point
    assert left - 1 <= column <= right and top - 1 <= row <= bottom
    assert 0 <= column < width and 0 <= row < height
    assert bool(found.notes) == (shares[0] > shares[2] or shares[1] > shares[3])


def test_a_box_that_is_turned_around_is_repaired_and_said(answer: Answer) -> None:
    found = locate(replace(answer, text="[0.8, 0.1, 0.2, 0.5]"), (200, 100))
    assert found.box == (0.2, 0.1, 0.8, 0.5)
    assert found.pixels == (40, 10, 160, 50)
    assert found.point == (100, 30)
    assert found.notes == ("the box [0.8, 0.1, 0.2, 0.5] was turned around: its sides are swapped",)


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("[0.1, 0.2, 1.3, 0.4]", "stop", r"the box \[0.1, 0.2, 1.3, 0.4\] leaves the picture"),
        ("[58, 2, 88, 12]", "stop", "leaves the picture"),
        ("The Save button\nis below.", "stop", "the answer is 'The Save button is below.', wanted a box"),
        ("[0.1, 0.2", "length", "cut by the limit of tokens"),
        ("", "stop", "the answer is '', wanted a box"),
    ],
)
def test_answers_that_give_no_box(answer: Answer, text: str, reason: str, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        locate(replace(answer, text=text, finish_reason=reason), (100, 100))


def test_without_llguidance_the_answer_is_free_and_that_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phisight.grounding.is_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    found = model.ground(BUTTONS, SAVE)
    assert "phisight[schema]" in found.notes[0]
    assert found.pixels[0] > 50


def test_what_the_caller_says_goes_first(model: Model) -> None:
    with pytest.raises(AnswerError, match="the answer is 'no', wanted"):
        model.ground(BUTTONS, SAVE, options=model.options(constraint=Constraint.grammar('start: "no"')))
    with pytest.raises(InputError, match="the instruction is empty"):
        model.ground(BUTTONS, " ")
    with pytest.raises(Cancelled):
        model.ground(BUTTONS, SAVE, cancel=lambda: True)
