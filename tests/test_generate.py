"""Prefill, decode and the bookkeeping of the KV cache, on a decoder whose logits depend on all it has read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.cached_decoder import CachedDecoder
from phisight.errors import Cancelled, EngineError, InputError, PromptError
from phisight.generate import ControlIds, GeneratedToken, GenerateOptions, Generation
from phisight.sequence import IMAGE_SLOT, ImageFeatures, InputSequence, splice

VOCAB, HIDDEN = 50, 3
END, THINK, END_THINK = 40, 41, 42
GREEDY = GenerateOptions(temperature=0)
NO_STOP = ControlIds(stop=frozenset())


class PrefixDecoder:
    """A decoder whose logits at a position are a hash of everything up to it, however it was cut in chunks.

    It reuses one buffer for all logits, as an engine may, and refuses to write beyond what was reserved.
    `script` overrides it: the token that is likeliest behind so many positions.
    """

    hidden_size = HIDDEN
    vocab_size = VOCAB

    def __init__(self, script: Callable[[int], int] | None = None) -> None:
        self.rows: list[bytes] = []
        self.capacities: list[int] = []
        self.chunks: list[int] = []
        self.fail_at_chunk: int | None = None
        self._script = script
        self._buffer = np.empty((4096, VOCAB), dtype=np.float32)

    @property
    def length(self) -> int:
        return len(self.rows)

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        self.capacities.append(capacity)

    def truncate(self, length: int) -> None:
        del self.rows[length:]

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        new = [row.tobytes() for piece in pieces for row in piece]
        if self.length + len(new) > max(self.capacities, default=0):
            raise AssertionError(f"{self.length + len(new)} positions in room for {self.capacities}")
        if self.fail_at_chunk == len(self.chunks):
            self.fail_at_chunk = None
            self.rows += new[: len(new) // 2 + 1]  # broken off midway
            raise EngineError("out of memory")
        self.chunks.append(len(new))
        for index, row in enumerate(new):
            self.rows.append(row)
            self._buffer[index] = self._logits()
        return self._buffer[: len(new)] if logits == "all" else self._buffer[len(new) - 1 : len(new)]

    def _logits(self) -> NDArray[np.float32]:
        if self._script is not None:
            logits = np.zeros(VOCAB, dtype=np.float32)
            logits[self._script(self.length)] = 1
            return logits
        seed = np.frombuffer(b"".join(self.rows), dtype=np.uint8)
        return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)

    @property
    def positions_run(self) -> int:
        return sum(self.chunks)


def image(name: str, rows: int) -> ImageFeatures:
    features = np.random.default_rng(list(name.encode())).normal(size=(rows, HIDDEN)).astype(np.float32)
    return ImageFeatures(name.encode(), features)


def spliced(ids: Sequence[int], *images: ImageFeatures) -> InputSequence:
    return splice(ids, images, vocab_size=VOCAB, hidden_size=HIDDEN)


def generation(
    cached: CachedDecoder, sequence: InputSequence, options: GenerateOptions = GREEDY, **more: Any
) -> Generation:
    return Generation(cached, sequence, options, more.pop("control", NO_STOP), **more)


def answer(sequence: InputSequence, options: GenerateOptions) -> list[int]:
    """What a decoder that has read nothing before answers."""
    fresh = CachedDecoder(PrefixDecoder(), 1000)
    return [token.token_id for token in generation(fresh, sequence, options)]


def greedy_by_full_recompute(sequence: InputSequence, count: int) -> list[int]:
    """Reads everything again for each token."""
    tokens: list[int] = []
    for _ in range(count):
        decoder = PrefixDecoder()
        decoder.reserve(1000)
        text = [np.array(tokens, dtype=np.int32)]
        tokens.append(int(decoder.append([*sequence.pieces(0, len(sequence)), *text])[0].argmax()))
    return tokens


PHOTO = spliced([1, 2, IMAGE_SLOT, 3, 4], image("cat", 11))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 15, 16, 256])
def test_chunks_change_nothing(chunk: int) -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    options = GenerateOptions(temperature=0, max_tokens=6, prefill_chunk=chunk)
    tokens = [token.token_id for token in generation(cached, PHOTO, options)]
    assert tokens == greedy_by_full_recompute(PHOTO, 6)
    prefill = decoder.chunks[: -(-15 // chunk)]
    assert sum(prefill) == 15 and max(prefill) == min(chunk, 15)


def test_score_gives_every_positions_logits() -> None:
    whole = PrefixDecoder()
    whole.reserve(15)
    wanted = whole.append(list(PHOTO.pieces(0, 15)), "all").copy()
    cached = CachedDecoder(PrefixDecoder(), 1000)
    cached.prefill(PHOTO, chunk=4)
    scores = cached.score(PHOTO, chunk=4)
    assert scores.shape == (15, VOCAB) and scores.dtype == np.float32
    np.testing.assert_array_equal(scores, wanted)
    assert cached.keys.tolist() == PHOTO.keys.tolist()


def test_the_next_turn_pays_only_for_its_own_tokens() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    first = generation(cached, PHOTO, GenerateOptions(temperature=0, max_tokens=5))
    tokens = [token.token_id for token in first]
    assert decoder.positions_run == 15 + 4  # the last token is not run
    second = spliced([1, 2, IMAGE_SLOT, 3, 4, *tokens, 8, 9], image("cat", 11))
    follow_up = generation(cached, second, GenerateOptions(temperature=0, max_tokens=1))
    assert [token.token_id for token in follow_up] == greedy_by_full_recompute(second, 1)
    assert decoder.positions_run == 19 + 3  # that last token, 8 and 9
    assert follow_up.timings.reused_positions == 19
    assert follow_up.timings.prefill_positions == 3


def test_a_repeated_question_runs_one_position() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    logits = cached.prefill(PHOTO, chunk=4).copy()
    assert decoder.positions_run == 15
    np.testing.assert_array_equal(cached.prefill(PHOTO, chunk=4), logits)
    assert decoder.positions_run == 16


def test_another_image_is_not_taken_for_the_one_before() -> None:
    cached = CachedDecoder(PrefixDecoder(), 1000)
    dog = spliced([1, 2, IMAGE_SLOT, 3, 4], image("dog", 11))
    cached.prefill(PHOTO, chunk=256)
    after_cat = generation(cached, dog, GenerateOptions(temperature=0, max_tokens=3))
    assert [token.token_id for token in after_cat] == greedy_by_full_recompute(dog, 3)
    assert after_cat.timings.reused_positions == 2


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_history_changes_an_answer(data: st.DataObject) -> None:
    """Requests, cancels, failures, closed answers and scores in any order: each answer is a fresh decoder's."""
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    part = st.sampled_from([1, 2, 3, IMAGE_SLOT])
    for _ in range(data.draw(st.integers(1, 6))):
        ids = data.draw(st.lists(part, min_size=1, max_size=6))
        images = [image(data.draw(st.sampled_from("ab")), 3) for _ in range(ids.count(IMAGE_SLOT))]
        sequence = spliced(ids, *images)
        chunk = data.draw(st.integers(1, 5))
        options = GenerateOptions(temperature=0.9, seed=1, max_tokens=4, prefill_chunk=chunk)
        match data.draw(st.sampled_from(["answer", "close", "cancel", "fail", "score"])):
            case "answer":
                tokens = [token.token_id for token in generation(cached, sequence, options)]
                assert tokens == answer(sequence, options)
            case "close":
                opened = generation(cached, sequence, options)
                for _ in range(data.draw(st.integers(0, 3))):
                    next(opened)
                opened.close()
            case "cancel":
                answers = iter([False] * data.draw(st.integers(0, 4)))
                list(generation(cached, sequence, options, cancel=lambda: next(answers, True)))  # noqa: B023
            case "fail":
                decoder.fail_at_chunk = len(decoder.chunks) + data.draw(st.integers(0, 2))
                with suppress(EngineError):
                    list(generation(cached, sequence, options))
                decoder.fail_at_chunk = None
            case "score":
                cached.score(sequence, chunk=chunk)
        assert len(cached.keys) == decoder.length


def test_an_engine_error_leaves_the_cache_as_it_was_before_the_chunk() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    decoder.fail_at_chunk = 2
    with pytest.raises(EngineError, match="out of memory"):
        cached.prefill(PHOTO, chunk=4)
    assert decoder.length == 8
    assert cached.keys.tolist() == PHOTO.keys[:8].tolist()
    before = decoder.positions_run
    cached.prefill(PHOTO, chunk=4)
    assert decoder.positions_run == before + 7


def test_an_interrupt_behind_the_engines_back_is_settled() -> None:
    """Positions that the decoder holds but nobody noted are dropped, and noted ones that it lost are forgotten."""
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    cached.prefill(PHOTO, chunk=4)
    decoder.rows.append(b"unknown")
    wanted = greedy_by_full_recompute(PHOTO, 3)
    options = GenerateOptions(temperature=0, max_tokens=3)
    assert [token.token_id for token in generation(cached, PHOTO, options)] == wanted
    decoder.truncate(5)
    assert [token.token_id for token in generation(cached, PHOTO, options)] == wanted


def test_forget() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    cached.prefill(PHOTO, chunk=16)
    cached.forget()
    assert decoder.length == 0 and len(cached.keys) == 0


def test_the_end_token_ends_the_answer_and_is_not_yielded() -> None:
    decoder = PrefixDecoder(script=lambda length: END if length == 6 else length)
    run = generation(CachedDecoder(decoder, 1000), spliced([1, 2, 3]), control=ControlIds(frozenset({END})))
    assert list(run) == [GeneratedToken(3, 0), GeneratedToken(4, 1), GeneratedToken(5, 2)]
    assert run.finish_reason == "stop"
    assert run.timings.generated_tokens == 3
    assert run.timings.decode_steps == 3
    assert list(run) == []


def test_max_tokens_ends_with_length() -> None:
    run = generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO, GenerateOptions(temperature=0, max_tokens=4))
    assert run.finish_reason is None
    assert len(list(run)) == 4
    assert run.finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [None, 5, 100])
def test_the_contexts_end_ends_with_length(max_tokens: int | None) -> None:
    """15 positions of 20: room for 5 tokens."""
    options = GenerateOptions(temperature=0, max_tokens=max_tokens)
    run = generation(CachedDecoder(PrefixDecoder(), 20), PHOTO, options)
    assert [token.token_id for token in run] == greedy_by_full_recompute(PHOTO, 5)
    assert run.finish_reason == "length"


def test_a_prompt_without_room_for_an_answer_is_refused_before_any_work() -> None:
    decoder = PrefixDecoder()
    wanted = (
        "the prompt takes 15 positions (4 text and 11 image tokens) with 7 new tokens asked for, but the context "
        "holds 15 and an answer needs at least 1 of them: use fewer patches per image, a shorter prompt or a "
        "larger context"
    )
    with pytest.raises(PromptError) as error:
        generation(CachedDecoder(decoder, 15), PHOTO, GenerateOptions(max_tokens=7))
    assert str(error.value) == wanted
    assert decoder.capacities == decoder.chunks == []


def test_prefill_and_score_take_a_prompt_that_fills_the_context() -> None:
    assert CachedDecoder(PrefixDecoder(), 15).score(PHOTO, chunk=256).shape == (15, VOCAB)
    for call in (CachedDecoder.prefill, CachedDecoder.score):
        decoder = PrefixDecoder()
        with pytest.raises(PromptError, match=r"15 positions .* context holds 14"):
            call(CachedDecoder(decoder, 14), PHOTO, chunk=256)
        assert decoder.capacities == decoder.chunks == []


def test_memory_is_sized_to_the_request() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 32768)
    run = generation(cached, PHOTO, GenerateOptions(temperature=0, max_tokens=3))
    list(run)
    assert decoder.capacities == [15 + 3]


def test_memory_grows_with_the_answer_and_never_beyond_it() -> None:
    decoder = PrefixDecoder(script=lambda length: length % 30)
    cached = CachedDecoder(decoder, 32768)
    list(generation(cached, PHOTO, GenerateOptions(temperature=0, max_tokens=2000)))
    assert decoder.length == 15 + 2000 - 1
    # 256 for a start, 256 more while a quarter is less, then a quarter; 15 + 2000 is the most.
    assert decoder.capacities == [271, 527, 783, 1039, 1298, 1622, 2015]


def test_cancel_during_the_prefill_keeps_the_chunks_that_were_run() -> None:
    decoder = PrefixDecoder()
    cached = CachedDecoder(decoder, 1000)
    stop = threading.Event()

    def progress(done: int, total: int) -> None:
        if done >= 4:
            stop.set()

    options = GenerateOptions(temperature=0, prefill_chunk=4)
    run = generation(cached, PHOTO, options, progress=progress, cancel=stop.is_set)
    assert list(run) == []
    assert run.finish_reason == "cancelled"
    # Set when the first chunk was done: the second is not run any more.
    assert decoder.chunks == [4]
    assert cached.keys.tolist() == PHOTO.keys[:4].tolist()
    with pytest.raises(Cancelled, match="after 0 of 11 positions"):
        cached.prefill(PHOTO, chunk=4, cancel=stop.is_set)


def test_cancel_takes_effect_before_the_next_token() -> None:
    decoder = PrefixDecoder()
    stop = threading.Event()
    run = generation(CachedDecoder(decoder, 1000), PHOTO, cancel=stop.is_set)
    next(run)
    next(run)
    stop.set()
    before = decoder.positions_run
    assert list(run) == []
    assert run.finish_reason == "cancelled"
    assert decoder.positions_run == before


def test_close_ends_the_answer() -> None:
    run = generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO)
    next(run)
    run.close()
    assert list(run) == []
    assert run.finish_reason == "cancelled"


def test_close_after_the_end_changes_no_reason() -> None:
    run = generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO, GenerateOptions(temperature=0, max_tokens=1))
    list(run)
    run.close()
    assert run.finish_reason == "length"


def test_an_older_answer_cannot_go_on_behind_a_newer_one() -> None:
    cached = CachedDecoder(PrefixDecoder(), 1000)
    older = generation(cached, PHOTO)
    next(older)
    newer = generation(cached, spliced([5, 6]), GenerateOptions(temperature=0, max_tokens=3))
    next(newer)
    with pytest.raises(EngineError, match="another request has begun"):
        next(older)
    assert len(list(newer)) == 2


def test_progress_counts_what_is_run() -> None:
    cached = CachedDecoder(PrefixDecoder(), 1000)
    seen: list[tuple[int, int]] = []
    cached.prefill(PHOTO, chunk=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 15), (6, 15), (12, 15), (15, 15)]
    seen.clear()
    longer = spliced([1, 2, IMAGE_SLOT, 3, 4, 5, 6], image("cat", 11))
    cached.prefill(longer, chunk=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (2, 2)]


def test_timings_count_a_broken_off_prefill() -> None:
    answers = iter([False, False])
    options = GenerateOptions(temperature=0, prefill_chunk=4)
    run = generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO, options, cancel=lambda: next(answers, True))
    list(run)
    assert (run.timings.prefill_positions, run.timings.reused_positions) == (8, 0)  # two chunks of 4
    assert run.timings.generated_tokens == 0


def thought_script(length: int) -> int:
    """Thinks without end: 3 positions of prompt, then the tokens 3, 4, 5, ..."""
    return length


WITH_THOUGHT = ControlIds(frozenset({END}), think=THINK, end_think=END_THINK)


@pytest.mark.parametrize(("budget", "wanted"), [(0, [42, 4, 5]), (1, [3, 42, 5]), (2, [3, 4, 42]), (9, [3, 4, 5])])
def test_thought_is_closed_by_force(budget: int, wanted: list[int]) -> None:
    run = generation(
        CachedDecoder(PrefixDecoder(thought_script), 1000),
        spliced([1, 2, THINK]),
        GenerateOptions(temperature=0, max_tokens=3, thinking_budget=budget),
        control=WITH_THOUGHT,
        starts_in_thought=True,
    )
    tokens = list(run)
    assert [token.token_id for token in tokens] == wanted
    assert [token.forced for token in tokens] == [token_id == END_THINK for token_id in wanted]


def run_with_budget(script: Callable[[int], int], budget: int, count: int) -> list[int]:
    """Answer to three tokens of prompt, in the mode where the model chooses whether it thinks."""
    run = generation(
        CachedDecoder(PrefixDecoder(script), 1000),
        spliced([1, 2, 3]),
        GenerateOptions(temperature=0, max_tokens=count, thinking_budget=budget),
        control=WITH_THOUGHT,
    )
    return [token.token_id for token in run]


def test_the_model_may_open_the_thought_itself() -> None:
    """Behind 3 positions it opens the thought; two tokens of it are granted, the opening does not count."""
    assert run_with_budget(lambda n: THINK if n == 3 else n, 2, 5) == [THINK, 4, 5, END_THINK, 7]


def test_an_answer_without_thought_has_no_budget() -> None:
    assert run_with_budget(lambda n: n, 0, 4) == [3, 4, 5, 6]


def test_a_thought_that_ends_in_time_is_left_alone() -> None:
    script = {3: THINK, 5: END_THINK}
    assert run_with_budget(lambda n: script.get(n, n), 2, 6) == [THINK, 4, END_THINK, 6, 7, 8]


def test_a_second_thought_spends_the_same_budget() -> None:
    script = {3: THINK, 5: END_THINK, 7: THINK}
    wanted = [THINK, 4, END_THINK, 6, THINK, 8, END_THINK, 10]
    assert run_with_budget(lambda n: script.get(n, n), 2, 8) == wanted


def test_a_budget_needs_a_token_that_closes_the_thought() -> None:
    with pytest.raises(InputError, match="thinking_budget is 5"):
        generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO, GenerateOptions(thinking_budget=5))


def test_the_penalty_covers_prompt_and_answer() -> None:
    """Token 7 has the logit 1, token 8 has 0.9; a penalty of 1.2 makes them 0.83 and 0.75 once they were seen."""

    class TwoTokens(PrefixDecoder):
        def _logits(self) -> NDArray[np.float32]:
            logits = np.zeros(VOCAB, dtype=np.float32)
            logits[[7, 8]] = 1, 0.9
            return logits

    def tokens_behind(prompt: list[int]) -> list[int]:
        options = GenerateOptions(temperature=0, repetition_penalty=1.2, max_tokens=4)
        run = generation(CachedDecoder(TwoTokens(), 1000), spliced(prompt), options)
        return [token.token_id for token in run]

    assert tokens_behind([1, 2]) == [7, 8, 7, 7]
    assert tokens_behind([7, 2]) == [8, 7, 7, 7]


def test_a_seed_repeats_the_answer_and_is_told() -> None:
    options = GenerateOptions(temperature=1.5, max_tokens=12)
    first = generation(CachedDecoder(PrefixDecoder(), 1000), PHOTO, options)
    tokens = [token.token_id for token in first]
    repeated = GenerateOptions(temperature=1.5, max_tokens=12, seed=first.seed)
    assert answer(PHOTO, repeated) == tokens


def test_no_logits_that_are_not_finite() -> None:
    class Broken(PrefixDecoder):
        def _logits(self) -> NDArray[np.float32]:
            return np.full(VOCAB, np.nan, dtype=np.float32)

    run = generation(CachedDecoder(Broken(), 1000), PHOTO)
    with pytest.raises(EngineError, match="NaN"):
        next(run)
    assert run.finish_reason is None
