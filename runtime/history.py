"""What was said, as the very ids that were read and drawn, so that they need not be run again.

A history rendered anew may tokenise an answer otherwise than the model wrote it (white space around a thought, a word
in other pieces), and the KV cache ends at the first difference. So the ids of what was said are kept and put in the
place of the rendered history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phisight.answer import Answer
from phisight.prompt import DIRECT, THINK_END, Message, Prompt, PromptBuilder, SystemBlock, user_message
from phisight.sequence import IMAGE_SLOT
from phisight.thought import ThoughtSplitter
from phisight.tokenizer import Tokenizer

__all__ = ["History", "Said"]


@dataclass(frozen=True)
class Said:
    """A conversation up to an answer, in messages and in ids; the end of the answer's turn is among them."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]


class History:
    """Turns answers into history, and history into prompts, for one model and system block."""

    def __init__(self, tokenizer: Tokenizer, prompts: PromptBuilder, system_block: SystemBlock = "keep") -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._system_block: SystemBlock = system_block
        self._turn_end = self._ids_after_an_answer()

    def answered(self, messages: Sequence[Message], prompt: Prompt, answer: Answer, ids: tuple[int, ...]) -> Said:
        """The conversation with the answer whose ids were drawn; a thought that it was cut in is closed."""
        direct = self._tokenizer.id_of(DIRECT)
        opened_direct = prompt.mode == "nothink" or ids[:1] == (direct,)
        message: dict[str, str] = {"role": "assistant", "content": (DIRECT if opened_direct else "") + answer.text}
        if answer.thought and not opened_direct:
            message["reasoning_content"] = answer.thought
        return Said((*messages, message), (*prompt.ids, *self._closed(ids, prompt), *self._turn_end))

    def continued(self, prompt: Prompt, said: Said) -> Prompt:
        """A prompt whose messages begin with those that were said, with their very ids where that is possible."""
        rendered = self._rendered(said.messages)
        if prompt.ids[: len(rendered)] != rendered:  # a template that renders an earlier turn otherwise later on
            return prompt
        if self._letters(rendered) != self._letters(said.ids):  # or one that leaves out earlier thoughts
            return prompt
        return replace(prompt, ids=said.ids + prompt.ids[len(rendered) :])

    def _closed(self, ids: tuple[int, ...], prompt: Prompt) -> tuple[int, ...]:
        splitter = ThoughtSplitter.for_tokenizer(self._tokenizer, prompt.mode)
        for token_id in ids:
            splitter.feed(token_id)
        end = self._tokenizer.id_of(THINK_END)
        return (*ids, end) if splitter.in_thought and end is not None else ids

    def _letters(self, ids: tuple[int, ...]) -> str:
        """What ids say, but for white space, which rendering and tokens treat differently."""
        return "".join(self._tokenizer.decode(i for i in ids if i != IMAGE_SLOT).split())

    def _rendered(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._prompts.build(messages, system_block=self._system_block, add_generation_prompt=False).ids

    def _ids_after_an_answer(self) -> tuple[int, ...]:
        """Ids with which the template ends an assistant's turn: what two different answers end with alike."""
        first, second = (
            self._rendered([user_message("?"), {"role": "assistant", "content": content}]) for content in ("0", "1")
        )
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        return first[len(first) - count :]
