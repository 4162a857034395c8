"""What the model thinks and what it answers, told apart while the tokens arrive.

Only token ids and the prompt's mode decide, never text: a `</think>` that the model merely quotes is made of
plain tokens and ends nothing, and a thought that the prompt opened has no opening token in the output.
"""

from __future__ import annotations

from typing import Literal

from phisight.prompt import DIRECT, THINK, THINK_END, Mode
from phisight.tokenizer import Tokenizer

__all__ = ["Channel", "ThoughtSplitter"]

Channel = Literal["thought", "answer"]


class ThoughtSplitter:
    """Follows one generation, token by token.

    `<think>` opens a thought wherever it comes, also within an answer; `</think>` closes it; `<|dummy_84|>`
    opens nothing, for the answer is where a generation starts unless the prompt opened a thought. None of the
    three is ever shown, in its place or out of it. Whoever decodes the text flushes the decoder where the
    channel changes.
    """

    def __init__(self, think: int | None, think_end: int | None, direct: int | None, mode: Mode) -> None:
        """The ids of `<think>`, `</think>` and `<|dummy_84|>`, None for one that the tokenizer lacks.

        `mode` is that of the `Prompt`: "think" means that the prompt has opened a thought.
        """
        self._think = think
        self._think_end = think_end
        self._direct = direct
        self._in_thought = mode == "think"
        self._thought_closed = False
        self._thought_tokens = 0

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, mode: Mode) -> ThoughtSplitter:
        """A splitter with the ids of `tokenizer`."""
        control = tokenizer.control_tokens
        return cls(control.get(THINK), control.get(THINK_END), control.get(DIRECT), mode)

    def feed(self, token_id: int) -> Channel | None:
        """Where the token's text belongs; None for one of the three control tokens, which is not shown."""
        if token_id == self._think:
            self._in_thought = True
            self._thought_closed = False
            return None
        if token_id == self._think_end:
            self._thought_closed = self._thought_closed or self._in_thought
            self._in_thought = False
            return None
        if token_id == self._direct:
            return None
        if self._in_thought:
            self._thought_tokens += 1
            return "thought"
        return "answer"

    @property
    def in_thought(self) -> bool:
        """A thought is open."""
        return self._in_thought

    @property
    def thought_tokens(self) -> int:
        """Tokens of thought so far, control tokens not counted."""
        return self._thought_tokens

    @property
    def thought_closed(self) -> bool:
        """There was a thought, and `</think>` has ended it."""
        return self._thought_closed
