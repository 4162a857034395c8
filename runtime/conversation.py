"""Turns with a history: each question pays for its own tokens only.

The KV cache is reused as far as the next prompt begins with the very ids that are in it. A history rendered anew may
tokenise an answer otherwise than the model wrote it (white space around a thought, a word in other pieces), so the ids
of what was said are kept and put in the place of the rendered history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

from phisight.answer import Chunk, collect
from phisight.cached_decoder import Cancel
from phisight.images import ImageSource
from phisight.model import Model, StageProgress
from phisight.naflex import Patches
from phisight.options import GenerateOptions
from phisight.prompt import DIRECT, THINK_END, Message, Mode, Prompt, SystemBlock, user_message
from phisight.sequence import IMAGE_SLOT
from phisight.thought import ThoughtSplitter

__all__ = ["Conversation"]


class Conversation:
    """A conversation with one model, which nobody else may use meanwhile if the cache is to help.

    `system` is a system message; `system_block="none"` leaves out the template's own.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        system_block: SystemBlock = "keep",
        max_patches: int | None = None,
    ) -> None:
        self._model = model
        self._system_block = system_block
        self._max_patches = max_patches
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turn_end = self._ids_after_an_answer()
        self.reset()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said so far, the system message included."""
        return tuple(self._messages)

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self._messages: list[Message] = list(self._opening)
        self._images: list[Patches] = []
        self._said: tuple[int, ...] | None = None  # ids of the history as it is in the cache

    def ask(
        self,
        text: str,
        images: Sequence[ImageSource | Patches] = (),
        *,
        mode: Mode = "auto",
        options: GenerateOptions | None = None,
        cancel: Cancel | None = None,
        progress: StageProgress | None = None,
    ) -> Iterator[Chunk]:
        """Ask the next question; `images` are those that come with it. The answer is noted when it has ended.

        A cancelled answer is noted as far as it went; one that fails, is closed early or was cancelled before its first
        token leaves the history as it was. Raises as `Model.stream`.
        """
        options = options or self._model.options()
        started = perf_counter()
        new = [self._model.preprocess(image, self._max_patches) for image in images]
        seconds = perf_counter() - started
        question = user_message(text, len(new))
        patches = [*self._images, *new]
        prompt = self._prompt([*self._messages, question], len(patches), mode)
        chunks = self._model.stream_prompt(
            prompt, patches, options, preprocess_seconds=seconds, cancel=cancel, progress=progress
        )
        return self._noting(chunks, question, patches, prompt, exact=not options.stop)

    def _noting(
        self, chunks: Iterator[Chunk], question: Message, patches: list[Patches], prompt: Prompt, *, exact: bool
    ) -> Iterator[Chunk]:
        seen = []
        for chunk in chunks:
            seen.append(chunk)
            yield chunk
        ids = seen[-1].token_ids
        if not ids and seen[-1].finish_reason == "cancelled":
            return
        answer = collect(seen)
        direct = self._model.tokenizer.id_of(DIRECT)
        opened_direct = prompt.mode == "nothink" or ids[:1] == (direct,)
        message: dict[str, str] = {"role": "assistant", "content": (DIRECT if opened_direct else "") + answer.text}
        if answer.thought and not opened_direct:
            message["reasoning_content"] = answer.thought
        self._messages += [question, message]
        self._images = patches
        # A stop text is among the ids, but was not said: then the history is rendered anew.
        self._said = (*prompt.ids, *self._closed(ids, prompt.mode), *self._turn_end) if exact else None

    def _closed(self, ids: tuple[int, ...], mode: Mode) -> tuple[int, ...]:
        """The answer's ids, with the end of a thought that the answer was cut in."""
        splitter = ThoughtSplitter.for_tokenizer(self._model.tokenizer, mode)
        for token_id in ids:
            splitter.feed(token_id)
        end = self._model.tokenizer.id_of(THINK_END)
        return (*ids, end) if splitter.in_thought and end is not None else ids

    def _prompt(self, messages: list[Message], num_images: int, mode: Mode) -> Prompt:
        """The prompt, with the history's ids as they were said where that is possible."""
        prompt = self._model.prompt(messages, num_images, mode=mode, system_block=self._system_block)
        if self._said is None:
            return prompt
        rendered = self._history_ids(self._messages)
        if prompt.ids[: len(rendered)] != rendered:  # a template that renders an earlier turn otherwise later on
            return prompt
        if self._letters(rendered) != self._letters(self._said):  # or one that leaves out earlier thoughts
            return prompt
        return replace(prompt, ids=self._said + prompt.ids[len(rendered) :])

    def _letters(self, ids: tuple[int, ...]) -> str:
        """What ids say, but for white space, which rendering and tokens treat differently."""
        return "".join(self._model.tokenizer.decode(i for i in ids if i != IMAGE_SLOT).split())

    def _history_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        build = self._model.prompts.build
        return build(messages, system_block=self._system_block, add_generation_prompt=False).ids

    def _ids_after_an_answer(self) -> tuple[int, ...]:
        """Ids with which the template ends an assistant's turn: what two different answers end with alike."""
        first, second = (
            self._history_ids([user_message("?"), {"role": "assistant", "content": content}]) for content in ("0", "1")
        )
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        return first[len(first) - count :]
