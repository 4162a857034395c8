"""Turns with a history: each question pays for its own tokens only.

The KV cache is reused as far as the next prompt begins with the very ids that are in it: see `phisight.history`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

from phisight.answer import Chunk, collect
from phisight.cached_decoder import Cancel
from phisight.history import History, Said
from phisight.images import ImageSource
from phisight.model import Model, StageProgress
from phisight.naflex import Patches
from phisight.options import GenerateOptions
from phisight.prompt import Message, Mode, Prompt, SystemBlock, user_message

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
        self._history = History(model.tokenizer, model.prompts, system_block)
        self.reset()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said so far, the system message included."""
        return tuple(self._messages)

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self._messages: list[Message] = list(self._opening)
        self._images: list[Patches] = []
        self._said: Said | None = None  # the history as it is in the cache

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
        said = self._history.answered([*self._messages, question], prompt, collect(seen), ids)
        self._messages = list(said.messages)
        self._images = patches
        # A stop text is among the ids, but was not said: then the history is rendered anew.
        self._said = said if exact else None

    def _prompt(self, messages: list[Message], num_images: int, mode: Mode) -> Prompt:
        prompt = self._model.prompt(messages, num_images, mode=mode, system_block=self._system_block)
        return prompt if self._said is None else self._history.continued(prompt, self._said)
