"""read: a code, a word or a price anywhere in a picture, in capitals of 10 to 20 pixels."""

from __future__ import annotations

from random import Random

from phisight.tasks.canvas import Canvas, Colour, Control, ink_on, paper
from phisight.tasks.faces import FACES, size_of_capitals, text_width
from phisight.tasks.question import Question
from phisight.tasks.scene import Scene

__all__ = ["CODE_CHARACTERS", "WORDS", "draw_line", "random_code", "read_scene", "spelled"]

CODE_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = [
    "OK",
    "Cancel",
    "Save",
    "Open",
    "Close",
    "Next",
    "Back",
    "Send",
    "Edit",
    "Copy",
    "Help",
    "Exit",
    "Print",
    "Login",
    "Search",
    "Delete",
    "Apply",
    "Reset",
    "Start",
    "Stop",
    "Menu",
    "Home",
    "Undo",
    "Share",
]
MARGIN = 3
ASK = ("What does the text say?", "Read the text.", "What is written in the picture?", "Which text is shown?")
ASK_KIND = {
    "code": ("What code is shown?", "Read the code."),
    "price": ("What is the price?", "How much does it cost?"),
    "word": ("What does the button say?", "Which word is shown?"),
}


def read_scene(rng: Random, size: tuple[int, int]) -> Scene:
    """One line of text."""
    background = paper(rng)
    canvas = Canvas(size, background)
    kind = rng.choices(("code", "word", "price"), (0.7, 0.15, 0.15))[0]
    text = {"code": random_code, "word": lambda rng: rng.choice(WORDS), "price": _price}[kind](rng)
    text = draw_line(rng, canvas, text, background, framed=kind == "word", plate=rng.random() < 0.5)
    question = rng.choice(ASK + ASK_KIND[kind])
    thought = text if kind == "word" else spelled(text)
    return Scene((canvas,), (Question("read", kind, question, thought, text),))


def draw_line(
    rng: Random,
    canvas: Canvas,
    text: str,
    background: Colour,
    *,
    rows: tuple[int, int] | None = None,
    framed: bool = False,
    plate: bool = False,
    shortest: int = 3,
) -> str:
    """Draw a text somewhere between two rows of pixels; returns it, with characters left out if it was too wide."""
    top, bottom = rows or (0, canvas.height)
    face = rng.choice(FACES)
    room = canvas.width - 2 * MARGIN
    sizes = [size_of_capitals(height / 2) for height in range(20, 41)]
    sizes = [size for size in sizes if size + 4 <= bottom - top]
    while text_width(text, face, sizes[0]) > room and len(text) > shortest:
        text = text[:-1]
    size = rng.choice([size for size in sizes if text_width(text, face, size) <= room] or sizes[:1])
    spare = (room - text_width(text, face, size)) // max(len(text) - 1, 1)
    tracking = rng.randint(0, min(3, spare)) if spare > 0 and rng.random() < 0.5 else 0
    width, height = text_width(text, face, size, tracking), round(size * 0.98)
    x = rng.randint(MARGIN, max(MARGIN, canvas.width - MARGIN - width))
    y = rng.randint(top + 1, max(top + 1, bottom - height - 2))
    box = (x - rng.randint(2, 6), y - rng.randint(0, 4), x + width + rng.randint(2, 6), y + height + rng.randint(0, 4))
    box = (max(box[0], 0), max(box[1], 0), min(box[2], canvas.width), min(box[3], canvas.height))
    fill = background
    if plate:
        fill = paper(rng)
        canvas.rectangle(*box, fill)
    ink = ink_on(rng, fill)
    if framed:
        canvas.frame(*box, ink)
        canvas.marks.append(Control(text, "label", box))
    line = canvas.text(text, x, y + round(size * 0.76), face, size, ink, tracking)
    if not framed:
        canvas.marks.append(line)
    return text


def random_code(rng: Random) -> str:
    return "".join(rng.choice(CODE_CHARACTERS) for _ in range(rng.randint(3, 6)))


def spelled(text: str) -> str:
    """A thought that goes through a text: "A 7 Q"."""
    return " ".join(text)


def _price(rng: Random) -> str:
    return f"${rng.randint(1, 9)}.{rng.choice(('00', '25', '50', '75', '95', '99', '10', '20'))}"
