"""Guesses at what comes next, from what stands in the prompt and the answer already: prompt lookup decoding.

    the last 8, 4 or 2 tokens -> where they stood before -> the tokens that followed there -> a draft
    a copy that differed in one token -> the place behind it -> a draft

One run of the decoder checks a draft as a whole, for little more than the price of one token where the weights must
come from memory. Nothing is learnt and no second model is needed; it helps where an answer copies or repeats.

Idea: A. Saxena, Prompt Lookup Decoding (2023, https://github.com/apoorvumang/prompt-lookup-decoding); checking drafts:
Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DraftCosts", "PromptLookup", "draft_length"]

SIZES = (8, 4, 2)
"""Tokens that must agree, the most telling first."""

RESUMED = len(SIZES)
"""Instead of a size's number: the copy goes on behind a token that was another one."""

FIRST_RATES = (0.8, 0.5, 0.2, 0.75)
"""How often a guess is right, by size or resumed, before anything was seen."""

COPIED = 8
"""So many right guesses in a row are a copy, which a single other token does not end."""

FIRST_GUESSES, MOST_GUESSES = 4, 16
"""A first rate counts as so many guesses, and what was seen as so many at most: rates follow the text."""


@dataclass(frozen=True)
class DraftCosts:
    """What checking takes, in times of a run of one token: `run` once for each check, `token` for each drafted token.

    The defaults are a bit more than ONNX Runtime takes at the real widths with INT4 (`python bench/prompt_lookup.py`).
    They are constants, so that the same seed gives the same runs of the engine on any day.
    """

    run: float = 0.1
    token: float = 0.55
    most: int = 7


def draft_length(rate: float, costs: DraftCosts) -> int:
    """How many tokens to draft if each is right at this rate where those before it were; 0 where none would pay."""
    saved, length, chance = 0.0, 0, rate
    while length < costs.most and chance > costs.token:
        saved += chance - costs.token
        length += 1
        chance *= rate
    return length if saved > costs.run else 0


class PromptLookup:
    """Follows one sequence of keys: token ids, and negative keys where there is an image, which is never drafted.

    Every token is first guessed, whether or not the guess was used as a draft: so the rates stay true at no cost, and
    drafting stops where guesses miss and begins again where they would have been right.
    """

    def __init__(self, keys: Iterable[int], costs: DraftCosts | None = None) -> None:
        self._costs = DraftCosts() if costs is None else costs
        self._keys: list[int] = []
        self._behind: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)
        self._rates = list(FIRST_RATES)
        self._seen = [FIRST_GUESSES] * len(FIRST_RATES)
        self._source: tuple[int, int] | None = None  # number of the size, and the position that is guessed to repeat
        self._streak = 0  # right guesses in a row
        for key in keys:
            self._add(key)

    def observe(self, token_id: int) -> None:
        """Take the next token: judge the guess at it, and look up the next one."""
        resumed = None
        if self._source is not None:
            size, place = self._source
            right = self._keys[place] == token_id
            self._seen[size] = min(self._seen[size] + 1, MOST_GUESSES)
            self._rates[size] += (right - self._rates[size]) / self._seen[size]
            if (size == RESUMED) if right else (self._streak >= COPIED):
                resumed = RESUMED, place + 1
            self._streak = self._streak + 1 if right else 0
        self._add(token_id)
        if resumed is not None and (self._source is None or self._rates[self._source[0]] < self._rates[RESUMED]):
            self._source = resumed

    def draft(self, most: int) -> list[int]:
        """What may come next: up to `most` tokens, none where checking them would not pay."""
        if self._source is None:
            return []
        size, place = self._source
        count = min(draft_length(self._rates[size], self._costs), most)
        period = len(self._keys) - place  # a text that repeats itself is drafted beyond its end
        drafted: list[int] = []
        for offset in range(count):
            key = self._keys[place + offset % period]
            if key < 0:
                break
            drafted.append(key)
        return drafted

    def _add(self, key: int) -> None:
        keys = self._keys
        keys.append(key)
        self._source = None
        if key < 0:
            return
        for number, size in enumerate(SIZES):
            if len(keys) < size:
                continue
            gram, behind = tuple(keys[-size:]), self._behind[number]
            if self._source is None and (place := behind.get(gram)) is not None:
                self._source = number, place
            behind[gram] = len(keys)
