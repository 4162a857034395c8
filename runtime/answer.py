"""An answer as it streams: tokens become text, thought and answer apart, and the last chunk says how it went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phisight.generate import FinishReason, Generation, Timings
from phisight.logprobs import ShownTokens, TokenLogprobs
from phisight.stopping import StopTexts
from phisight.thought import Channel, ThoughtSplitter
from phisight.tokenizer import IncrementalDecoder, Tokenizer

__all__ = ["Answer", "Chunk", "PromptCost", "Stats", "cancelled_early", "collect", "stream_text"]


@dataclass(frozen=True)
class Stats:
    """Counts and stage times of one answer. Times in seconds, each of its stage alone.

    image_tokens and text_tokens are those of the prompt, reused_positions of both were in the KV cache already;
    cached_images had their features at hand; accepted_tokens of drafted_tokens were guessed right by the prompt lookup.
    seed is None when nothing was to be drawn any more: the answer was cancelled while its images were encoded.
    """

    preprocess_seconds: float
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    images: int
    cached_images: int
    image_tokens: int
    text_tokens: int
    reused_positions: int
    prefill_positions: int
    thought_tokens: int
    generated_tokens: int
    decode_steps: int
    seed: int | None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        cached = f", {self.cached_images} of them encoded before" if self.cached_images else ""
        yield (
            f"images:  {self.images}{cached}: {self.preprocess_seconds:.2f} s to prepare, "
            f"{self.encode_seconds:.2f} s to encode"
        )
        reused = f" ({self.reused_positions} of them cached)" if self.reused_positions else ""
        yield (
            f"prompt:  {self.text_tokens} text and {self.image_tokens} image tokens{reused}: "
            f"{self.prefill_seconds:.2f} s{_rate(self.prefill_positions, self.prefill_seconds)}"
        )
        seed = "" if self.seed is None else f", seed {self.seed}"
        yield (
            f"answer:  {self.generated_tokens} tokens, {self.thought_tokens} of them thought: "
            f"{self.decode_seconds:.2f} s{_rate(self.decode_steps, self.decode_seconds)}{seed}"
        )
        if self.drafted_tokens:
            yield f"lookup:  {self.accepted_tokens} of {self.drafted_tokens} guessed tokens were right"


@dataclass(frozen=True)
class Chunk:
    """A piece of text, at most one character short of what was generated; the last one has no text but the end.

    finish_reason: "stop", "length" or "cancelled" in the last chunk, None before it, as is `stats`.
    token_ids: in the last chunk all ids that were generated, control tokens too, without the end token.
    logprobs: of the answer's tokens whose text begins in this chunk, if the options ask for them.
    """

    text: str
    channel: Channel = "answer"
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer. `text` may be empty when the thought took all tokens: see `finish_reason`.

    notes: what stands elsewhere in the prompt than the messages had it.
    """

    text: str
    thought: str
    finish_reason: FinishReason
    stats: Stats
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptCost:
    """What was done before the first token."""

    preprocess_seconds: float
    encode_seconds: float
    images: int
    cached_images: int
    image_tokens: int
    text_tokens: int


def stream_text(
    generation: Generation, tokenizer: Tokenizer, splitter: ThoughtSplitter, stops: StopTexts, cost: PromptCost
) -> Iterator[Chunk]:
    """The tokens of a generation as chunks of text, then one that ends it. Stop texts are looked for in the answer."""
    decoder = IncrementalDecoder(tokenizer)
    channel: Channel = "thought" if splitter.in_thought else "answer"
    ids: list[int] = []
    tokens = ShownTokens()
    try:
        for token in generation:
            ids.append(token.token_id)
            to = splitter.feed(token.token_id)
            if to != channel or to is None:
                yield from _chunks(decoder.flush(), channel, stops, tokens)
            if to is None:
                continue
            channel = to
            yield from _chunks(decoder.push(token.token_id), channel, stops, tokens, token.logprobs)
            if stops.found:
                break
        yield from _chunks(decoder.flush(), channel, stops, tokens)
        held = stops.flush()
        if held:
            yield Chunk(held, logprobs=tokens.pop(held))
        reason: FinishReason = "stop" if stops.found else generation.finish_reason or "cancelled"
        stats = _stats(cost, generation.timings, generation.seed, splitter.thought_tokens)
        yield Chunk("", channel, reason, stats, tuple(ids))
    finally:
        generation.close()


def cancelled_early(cost: PromptCost) -> Chunk:
    """All there is of an answer that was cancelled while its images were encoded."""
    return Chunk("", finish_reason="cancelled", stats=_stats(cost, Timings(), seed=None, thought_tokens=0))


def collect(chunks: Iterable[Chunk], notes: tuple[str, ...] = ()) -> Answer:
    """All chunks of an answer put together."""
    texts: dict[Literal["thought", "answer"], list[str]] = {"thought": [], "answer": []}
    last = Chunk("")
    for last in chunks:
        texts[last.channel].append(last.text)
    if last.finish_reason is None or last.stats is None:
        raise ValueError("the chunks of an answer end with one that has a finish reason")
    return Answer("".join(texts["answer"]), "".join(texts["thought"]), last.finish_reason, last.stats, notes)


def _rate(count: int, seconds: float) -> str:
    return f", {count / seconds:.1f} tokens/s" if count and seconds else ""


def _chunks(
    text: str, channel: Channel, stops: StopTexts, tokens: ShownTokens, logprobs: TokenLogprobs | None = None
) -> Iterator[Chunk]:
    """`logprobs` is that of the token that completed the text."""
    if channel == "thought":
        if text:
            yield Chunk(text, channel)
        return
    tokens.push(text, logprobs)
    if shown := stops.push(text):
        yield Chunk(shown, channel, logprobs=tokens.pop(shown))


def _stats(cost: PromptCost, timings: Timings, seed: int | None, thought_tokens: int) -> Stats:
    return Stats(
        **asdict(cost),
        prefill_seconds=timings.prefill_seconds,
        decode_seconds=timings.decode_seconds,
        reused_positions=timings.reused_positions,
        prefill_positions=timings.prefill_positions,
        thought_tokens=thought_tokens,
        generated_tokens=timings.generated_tokens,
        decode_steps=timings.decode_steps,
        seed=seed,
        drafted_tokens=timings.drafted_tokens,
        accepted_tokens=timings.accepted_tokens,
    )
