"""The conversations of the clients, recognised by what they send back, so that only what is new in them is run."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phisight.answer import Chunk, collect
from phisight.history import History, Said
from phisight.model import Model
from phisight.prompt import Message, Mode, Prompt

__all__ = ["Memory", "Question"]

_KEPT = 64


@dataclass(frozen=True)
class Question:
    """A client's messages, the same with what it does not see of earlier answers, and the prompt made of these."""

    client: bytes
    sent: tuple[Message, ...]
    messages: tuple[Message, ...]
    prompt: Prompt


class Memory:
    """What was said lately. Nothing of one client's is used for another. For several threads.

    A client that sends a thought back (as reasoning_content) has it kept in the prompt; for one that does not, the
    conversation is known up to the first answer with a thought.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._history = History(model.tokenizer, model.prompts)
        self._said: OrderedDict[bytes, Said] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def question(self, client: bytes, sent: tuple[Message, ...], num_images: int, mode: Mode) -> Question:
        """The prompt for a client's messages, with their history as it was said. Raises PromptError."""
        said = self._longest(client, sent)
        messages = sent if said is None else (*said.messages, *sent[len(said.messages) :])
        prompt = self._model.prompt(messages, num_images, mode=mode)
        return Question(client, sent, messages, prompt if said is None else self._history.continued(prompt, said))

    def noting(self, question: Question, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks of its answer, which is known before the last one is given."""
        seen: list[Chunk] = []
        for chunk in chunks:
            seen.append(chunk)
            if chunk.finish_reason in ("stop", "length"):
                self._note(question, seen)
            yield chunk

    def _note(self, question: Question, chunks: list[Chunk]) -> None:
        answer = collect(chunks)
        said = self._history.answered(question.messages, question.prompt, answer, chunks[-1].token_ids)
        told = {"role": "assistant", "content": answer.text}
        if answer.thought:
            told["reasoning_content"] = answer.thought
        with self._lock:
            self._said[_key(question.client, (*question.sent, told))] = said
            while len(self._said) > _KEPT:
                self._said.popitem(last=False)

    def _longest(self, client: bytes, sent: tuple[Message, ...]) -> Said | None:
        """The longest conversation that these messages go on with."""
        for length in range(len(sent) - 1, 0, -1):
            if sent[length - 1]["role"] != "assistant":
                continue
            key = _key(client, sent[:length])
            with self._lock:
                if key in self._said:
                    self._said.move_to_end(key)
                    return self._said[key]
        return None


def _key(client: bytes, messages: Sequence[Message]) -> bytes:
    text = json.dumps([client.hex(), *messages], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()
