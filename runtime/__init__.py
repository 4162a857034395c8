"""phisight: microsoft/Phi-4-reasoning-vision-15B on your own machine.

model = phisight.load("demo")
for chunk in model.stream("What does the text say?", ["picture.png"]):
    print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from phisight.answer import Answer, Chunk, Stats
from phisight.constraint import Constraint
from phisight.errors import PhisightError
from phisight.images import open_image
from phisight.loading import load
from phisight.model import Model
from phisight.naflex import Patches, preprocess, target_size
from phisight.options import GenerateOptions

__all__ = [
    "Answer",
    "Chunk",
    "Constraint",
    "GenerateOptions",
    "Model",
    "Patches",
    "PhisightError",
    "Stats",
    "load",
    "open_image",
    "preprocess",
    "target_size",
]
