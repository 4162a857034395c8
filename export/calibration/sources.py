"""Where calibration data comes from: drawn pictures with questions, text, or the user's own folder.

    demo      drawn pictures with questions, thoughts and answers, and for a quarter of the tokens the built-in text
    text      the built-in text alone
    FILE.txt  a text
    FOLDER    pictures with questions in cases.jsonl, *.txt, and other *.jsonl with {"text": ...} on each line

The built-in text is our own writing about everyday things.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

from phisight.chat_template import read_chat_template
from phisight.config import ImageBudget, ModelConfig
from phisight.errors import ImageError, InputError
from phisight.evaluate.cases import Case
from phisight.evaluate.folder import FILE_NAME, read_folder
from phisight.evaluate.scoring import BoxHit, Contains, Exact, Number
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.images import ImageSource
from phisight.json_lines import Fields, read_lines, read_object
from phisight.naflex import Patches, preprocess
from phisight.prompt import DIRECT, THINK, THINK_END, Message, PromptBuilder, user_message
from phisight.tasks import TASKS, Question, draw, grids_of
from phisight.tasks.arithmetic import arithmetic_question
from phisight.text_file import read_text_file
from phisight.tokenizer import Tokenizer

__all__ = ["DEFAULT_TOKENS", "read_calibration"]

DEFAULT_TOKENS = 24576
"""Positions, text and image tokens together."""
WINDOW = 512
"""Tokens of a text that are read as one sequence."""
TEXT_SHARE = 0.25
THOUGHTS = 0.3
"""How often a question that needs no thought is answered with one."""
BUILT_IN = "everyday.txt"
TEXT_FIELDS: Fields = {"text": (str, "a text")}


@dataclass(frozen=True)
class Reader:
    """What turns words and pictures into sequences for one checkpoint. `budget` is None for a text-only one."""

    tokenizer: Tokenizer
    prompts: PromptBuilder
    budget: ImageBudget | None
    context: int

    @classmethod
    def of(cls, directory: Path, config: ModelConfig) -> Reader:
        """Raises TokenizerError."""
        tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
        prompts = PromptBuilder(tokenizer, read_chat_template(directory))
        return cls(tokenizer, prompts, config.images, config.decoder.context_length)

    def text(self, name: str, text: str, most: int) -> Iterator[CalibrationSequence]:
        """A text in windows, at most `most` tokens of it."""
        ids = self.tokenizer.encode(text, parse_special=False)[:most]
        step = min(WINDOW, self.context)
        for start in range(0, len(ids), step):
            yield CalibrationSequence(name, tuple(ids[start : start + step]))

    def dialogue(
        self, name: str, question: str, pictures: tuple[ImageSource, ...], answer: str, thought: str | None
    ) -> CalibrationSequence:
        """A question with its answer as the assistant's turn, after a thought, or direct where that is None.

        Raises ImageError, PromptError, and InputError for a sequence beyond the model's context.
        """
        reply: Message = {"role": "assistant", "content": self._reply(answer, thought)}
        prompt = self.prompts.build([user_message(question, len(pictures)), reply], add_generation_prompt=False)
        sequence = CalibrationSequence(name, prompt.ids, tuple(map(self._patches, pictures)))
        if len(sequence) > self.context:
            raise InputError(
                f"question and pictures take {len(sequence)} positions, but the model has {self.context}: "
                "give smaller pictures"
            )
        return sequence

    def _reply(self, answer: str, thought: str | None) -> str:
        """With the control tokens that the tokenizer has: a text-only model may have none of them."""
        known = self.tokenizer.control_tokens
        if thought is not None and THINK in known and THINK_END in known:
            return f"{THINK}{thought}{THINK_END}{answer}"
        return f"{DIRECT}{answer}" if DIRECT in known else answer

    def _patches(self, picture: ImageSource) -> Patches:
        if self.budget is None:
            raise ImageError("the checkpoint is text-only and takes no pictures: calibrate it with text")
        return preprocess(picture, self.budget.max_patches, self.budget.min_patches)


def read_calibration(
    source: str, directory: Path, config: ModelConfig, *, tokens: int = DEFAULT_TOKENS
) -> CalibrationData:
    """`source` (see above) for the checkpoint in `directory`, about `tokens` positions of it or as many as there are.

    The same arguments give the same data. Raises InputError for a source that is missing, empty or faulty, ImageError
    for a picture that cannot be read, TokenizerError.
    """
    if tokens < 1:
        raise InputError(f"calibration tokens are {tokens}: give 1 or more, such as {DEFAULT_TOKENS}")
    reader = Reader.of(directory, config)
    if source == "demo":
        most = int(tokens * TEXT_SHARE)
        text = list(reader.text("built-in text", _built_in(), most))
        left = tokens - sum(map(len, text))
        found = [*_until(_drawn(reader), left), *text]
    elif source == "text":
        found = list(reader.text("built-in text", _built_in(), tokens))
    else:
        found = list(_until(_of_path(reader, Path(source), tokens), tokens))
    if not found:
        raise InputError(f"the calibration data {source} holds no token: give pictures with questions, or text")
    return CalibrationData(tuple(found))


def _until(sequences: Iterator[CalibrationSequence], tokens: int) -> Iterator[CalibrationSequence]:
    """Sequences until they have `tokens` positions."""
    count = 0
    while count < tokens and (sequence := next(sequences, None)) is not None:
        count += len(sequence)
        yield sequence


def _built_in() -> str:
    return files("phisight.export.calibration").joinpath(BUILT_IN).read_text(encoding="utf-8")


def _drawn(reader: Reader) -> Iterator[CalibrationSequence]:
    """Questions of all tasks in turn, without end. Their seeds are those of neither training nor evaluation."""
    tasks = TASKS if reader.budget is not None else ("arithmetic",)
    number = 0
    while True:
        for task in tasks:
            rng = Random(f"phisight calibration {task} {number}")
            pictures: tuple[ImageSource, ...] = ()
            if task == "arithmetic":
                question = arithmetic_question(rng)
            else:
                scene = draw(task, rng, rng.choice(grids_of(task)))
                pictures = tuple(canvas.pixels for canvas in scene.canvases)
                question = rng.choice(scene.questions)
            thought = question.thought if _thinks(question, rng) else None
            yield reader.dialogue(f"drawn {task}", question.text, pictures, question.answer, thought)
        number += 1


def _thinks(question: Question, rng: Random) -> bool:
    return question.thinks or rng.random() < THOUGHTS


def _of_path(reader: Reader, path: Path, tokens: int) -> Iterator[CalibrationSequence]:
    if path.is_file():
        yield from reader.text(path.name, read_text_file(path), tokens)
        return
    if not path.is_dir():
        raise InputError(f"the calibration data {path} is not there: give demo, text, a text file or a folder")
    cases = path / FILE_NAME
    texts = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".jsonl") and file != cases)
    if not texts and not cases.is_file():
        raise InputError(
            f"the calibration folder {path} has neither {FILE_NAME} with questions about pictures nor a .txt or "
            ".jsonl file: put one there"
        )
    if cases.is_file():
        yield from _cases(reader, path)
    for file in texts:
        for text in [read_text_file(file)] if file.suffix == ".txt" else _lines(file):
            yield from reader.text(file.name, text, tokens)


def _cases(reader: Reader, folder: Path) -> Iterator[CalibrationSequence]:
    tasks, problems = read_folder(folder)
    if problems:
        raise InputError(f"{folder / FILE_NAME}: {problems[0]}")
    for case in (case for cases in tasks.values() for case in cases):
        try:
            yield reader.dialogue(FILE_NAME, case.question, case.pictures, _answer(case), None)
        except InputError as error:
            raise type(error)(f"{folder / FILE_NAME}: line {case.number}: {error}") from None


def _answer(case: Case) -> str:
    """The expected answer as a model would write it."""
    match case.expected:
        case Exact(accepted) | Contains(accepted):
            return accepted[0]
        case BoxHit(box):
            return "[" + ", ".join(f"{edge:.2f}" for edge in box) + "]"
        case Number(value):
            return f"{value:.12g}"


def _lines(file: Path) -> Iterator[str]:
    for number, line in read_lines(file):
        try:
            text = read_object(line, TEXT_FIELDS).get("text", "")
        except InputError as error:
            raise InputError(f"{file}: line {number}: {error}") from None
        yield text
