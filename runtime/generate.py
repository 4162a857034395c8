"""Prefill and decode: a sequence of token ids and image features becomes a stream of token ids.

    InputSequence -> check of the context -> prefill (chunks, behind the cached prefix) -> logits
    logits -> sampler -> token (and a guess at those behind it) -> decoder -> logits -> ... -> a stop id, the limit,
                                                                                               or a cancel

The contract:
- Nothing here knows text. Ids come in, ids go out; stop texts and the thought's text are handled above.
- A prompt that leaves no room for one token is refused before any work. A prompt is never cut. An answer
  that reaches `max_tokens` or the context's end is not an error: its finish reason is "length".
- The token that ends the answer is not yielded, and tokens before it always are.
- A token is yielded before it is run, so that a reader has it at once; the last one of an answer is not run.
  The next request that contains it pays for it as for any new position.
- One answer at a time: once another request began on the decoder, the older answer cannot go on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.cached_decoder import CachedDecoder, Cancel, Progress
from phisight.constraint import AnswerRule
from phisight.context import check_context
from phisight.drafted_steps import DraftedSteps
from phisight.errors import Cancelled, InputError
from phisight.logprobs import TokenLogprobs, token_logprobs
from phisight.options import GenerateOptions
from phisight.prompt_lookup import PromptLookup
from phisight.sampling import Sampler
from phisight.sequence import InputSequence

__all__ = ["ControlIds", "FinishReason", "GenerateOptions", "GeneratedToken", "Generation", "Timings"]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]

# Room reserved for an answer at first, in positions; it grows while the answer does.
_FIRST_ROOM = 256


@dataclass(frozen=True)
class ControlIds:
    """Token ids that steer the generation: what ends an answer; `<think>` and `</think>`, None without them."""

    stop: frozenset[int]
    think: int | None = None
    end_think: int | None = None


@dataclass(frozen=True)
class GeneratedToken:
    """One token of the answer: its id, its number from 0, and whether the thinking budget forced it.

    logprobs: None unless the options ask for it.
    """

    token_id: int
    index: int
    forced: bool = False
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Timings:
    """What a generation did and how long it took. Time spent by the reader between two tokens is not in it.

    reused_positions: of the prompt, in the KV cache already; prefill_positions: of the prompt, run.
    generated_tokens: tokens yielded.
    decode_steps: tokens whose logits were asked for; decode_seconds holds their runs and the sampling, so that
        decode_steps / decode_seconds is the rate of decoding.
    drafted_tokens: guesses of the prompt lookup that were run with a token before them; accepted_tokens: those that
        were right.
    """

    prefill_seconds: float = 0.0
    prefill_positions: int = 0
    reused_positions: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Generation(Iterator[GeneratedToken]):
    """One answer: iterate over it for its tokens, then read `finish_reason` and `timings`.

    The check of the context happens when it is made, the prefill at the first token. `cancel` takes effect
    between two chunks of the prefill or between two tokens; it ends the iteration, as `close` does. Ids from
    `drawable` on are never drawn: the model's vocabulary may be larger than its tokenizer's. `rule` says which others
    may be drawn, and ends the iteration with the reason "stop" where only the end may follow.

    Raises PromptError for a prompt that leaves no room for one token, InputError for a thinking budget on a
    model that has no `</think>`. Iterating raises EngineError from the engine, for logits that are not finite,
    and when another request has begun on the decoder.
    """

    def __init__(
        self,
        decoder: CachedDecoder,
        sequence: InputSequence,
        options: GenerateOptions,
        control: ControlIds,
        *,
        drawable: int | None = None,
        starts_in_thought: bool = False,
        rule: AnswerRule | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        self._decoder = decoder
        self._sequence = sequence
        self._options = options
        self._control = control
        self._rule = rule
        self._progress = progress
        self._cancel = cancel
        self._limit = _token_limit(decoder, sequence, options)
        self._budget = _ThinkingBudget(options.thinking_budget, control, starts_in_thought)
        self._drawable = drawable
        self._sampler = Sampler(options, decoder.vocab_size, drawable)
        self._finish_reason: FinishReason | None = None
        self._timings = Timings()
        self._tokens = self._run()

    def __next__(self) -> GeneratedToken:
        return next(self._tokens)

    def close(self) -> None:
        """End the generation here. What was run stays cached."""
        self._tokens.close()
        self._finish_reason = self._finish_reason or "cancelled"

    @property
    def seed(self) -> int:
        """The sampler's seed, drawn if the options have none."""
        return self._sampler.seed

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended: "stop" (a stop id), "length" (the limit) or "cancelled"; None before the end."""
        return self._finish_reason

    @property
    def timings(self) -> Timings:
        """Counts and times so far."""
        return self._timings

    def _run(self) -> Generator[GeneratedToken, None, None]:
        try:
            logits = self._prefill()
        except Cancelled:
            self._finish_reason = "cancelled"
            return
        steps = DraftedSteps(self._decoder, self._lookup(), len(self._sequence) + self._limit)
        try:
            yield from self._decode(logits, steps)
        finally:
            steps.close()

    def _decode(self, logits: NDArray[np.float32], steps: DraftedSteps) -> Iterator[GeneratedToken]:
        token_id = -1
        for index in range(self._limit):
            if self._cancel is not None and self._cancel():
                self._finish_reason = "cancelled"
                return
            started = perf_counter()
            if index > 0:
                logits = steps.logits(token_id, self._limit - index)
            token_id, forced = self._next_token(logits)
            ended = token_id in self._control.stop
            self._timings = replace(
                self._timings,
                decode_seconds=self._timings.decode_seconds + perf_counter() - started,
                decode_steps=index,
                generated_tokens=index + (not ended),
                drafted_tokens=steps.drafted,
                accepted_tokens=steps.accepted,
            )
            if ended:
                self._finish_reason = "stop"
                return
            yield GeneratedToken(token_id, index, forced, self._logprobs(logits, token_id))
            if self._rule is not None and self._rule.complete:  # only the end can follow
                self._finish_reason = "stop"
                return
        self._finish_reason = "length"

    def _prefill(self) -> NDArray[np.float32]:
        started = perf_counter()

        def note(done: int, total: int) -> None:
            self._timings = Timings(
                prefill_seconds=perf_counter() - started,
                prefill_positions=done,
                reused_positions=len(self._sequence) - total,
            )
            if self._progress is not None:
                self._progress(done, total)

        self._sampler.observe(self._sequence.text_ids)
        return self._decoder.prefill(
            self._sequence,
            chunk=self._options.prefill_chunk,
            room=min(self._limit, _FIRST_ROOM),
            progress=note,
            cancel=self._cancel,
        )

    def _lookup(self) -> PromptLookup | None:
        return PromptLookup(self._sequence.keys.tolist()) if self._options.prompt_lookup else None

    def _next_token(self, logits: NDArray[np.float32]) -> tuple[int, bool]:
        """The next token and whether it was forced."""
        closing = self._budget.forced_token()
        token_id = self._draw(logits) if closing is None else closing
        self._budget.observe(token_id)
        self._sampler.observe(token_id)
        if self._rule is not None and token_id not in self._control.stop:
            self._rule.observe(token_id)
        return token_id, closing is not None

    def _logprobs(self, logits: NDArray[np.float32], token_id: int) -> TokenLogprobs | None:
        count = self._options.logprobs
        return None if count is None else token_logprobs(logits[: self._drawable], token_id, count)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        return self._sampler.sample(logits) if self._rule is None else self._rule.draw(logits, self._sampler.sample)


class _ThinkingBudget:
    """Counts the tokens of the thought and says when it must be closed.

    A thought is open from the start of the answer, or from a `<think>` in it, and ends with `</think>`; these
    two are not counted. The budget is for the whole answer, also if the model thinks a second time.
    """

    def __init__(self, limit: int | None, control: ControlIds, starts_in_thought: bool) -> None:
        if limit is not None and control.end_think is None:
            raise InputError(f"thinking_budget is {limit} but the model has no </think> token: give None")
        self._limit = limit
        self._control = control
        self._open = starts_in_thought
        self._tokens = 0

    def forced_token(self) -> int | None:
        """The id of `</think>` if it is due."""
        due = self._limit is not None and self._open and self._tokens >= self._limit
        return self._control.end_think if due else None

    def observe(self, token_id: int) -> None:
        """Count a token of the answer."""
        if token_id == self._control.think:
            self._open = True
        elif token_id == self._control.end_think:
            self._open = False
        elif self._open:
            self._tokens += 1


def _token_limit(decoder: CachedDecoder, sequence: InputSequence, options: GenerateOptions) -> int:
    """Most tokens of this answer: every one has a place in the context, also the last, which is not run."""
    text = len(sequence.text_ids)
    check_context(text, len(sequence) - text, decoder.context, max_tokens=options.max_tokens)
    free = decoder.context - len(sequence)
    return free if options.max_tokens is None else min(options.max_tokens, free)
