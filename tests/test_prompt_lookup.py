"""Prompt lookup: what is guessed, and that an answer is the same, or distributed the same, with and without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.backends.base import LogitsWanted, Piece
from phisight.cached_decoder import CachedDecoder
from phisight.constraint import Constraint
from phisight.errors import EngineError, InputError
from phisight.generate import ControlIds, Generation
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt_lookup import DraftCosts, PromptLookup, draft_length
from phisight.sequence import splice

DEMO = Path(phisight.__file__).parent / "demo"
PRICE = DEMO / "pictures/price.png"
COPY = list(range(100, 120))
VOCAB = 4
CYCLE = [0, 1, 2, 3] * 6
FREE = DraftCosts(run=0, token=0, most=5)
"""Drafts whatever was found."""


class ChainDecoder:
    """Logits that depend on the last two tokens. It reuses one buffer, as an engine may."""

    hidden_size, vocab_size = 1, VOCAB

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.chunks: list[int] = []
        self.fail = False
        self.table = np.random.default_rng(5).normal(0, 1, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        self._buffer = np.empty((64, VOCAB), np.float32)

    @property
    def length(self) -> int:
        return len(self.ids)

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        pass

    def truncate(self, length: int) -> None:
        del self.ids[length:]

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        new = [int(id_) for piece in pieces for id_ in piece]
        self.chunks.append(len(new))
        for row, id_ in enumerate(new):
            self.ids.append(id_)
            if self.fail:
                raise EngineError("broken off midway")
            self._buffer[row] = self.table[self.ids[-2:][0], id_]
        return self._buffer[: len(new)] if logits == "all" else self._buffer[len(new) - 1 : len(new)]


def chain(decoder: ChainDecoder, **options: Any) -> tuple[CachedDecoder, Generation]:
    cached = CachedDecoder(decoder, 1000)
    sequence = splice(CYCLE, [], vocab_size=VOCAB, hidden_size=1)
    settings = GenerateOptions(**{"temperature": 1, "top_p": 1, "max_tokens": 6, "prompt_lookup": True} | options)
    return cached, Generation(cached, sequence, settings, ControlIds(stop=frozenset()))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is a draft, so that many are wrong."""
    monkeypatch.setattr("phisight.generate.PromptLookup", partial(PromptLookup, costs=FREE))


@pytest.fixture(scope="module")
def exact() -> Model:
    return phisight.load("demo", threads=1, accuracy_level=0)


@pytest.fixture(scope="module")
def llama(exported_gguf: Callable[..., Path]) -> Model:
    pytest.importorskip("llama_cpp")
    return phisight.load(exported_gguf(DEMO / "checkpoint", decoder="F32"), threads=1)


def test_a_copy_is_drafted_from_where_it_stood() -> None:
    lookup = PromptLookup([*COPY, 7, 8, 9, *COPY[:8]])
    assert lookup.draft(1) == COPY[8:9]
    for id_ in COPY[8:18]:
        lookup.observe(id_)
    drafted = lookup.draft(100)
    assert 5 < len(drafted) <= DraftCosts().most  # as many as pay at its rate
    assert drafted == [*COPY[18:], 7, 8, 9, *COPY][: len(drafted)]
    assert PromptLookup(COPY).draft(5) == []


def test_a_copy_goes_on_behind_another_token() -> None:
    lookup = PromptLookup([*COPY, 7, 8, 9, *COPY[:2]])
    for id_ in (*COPY[2:14], 99):
        lookup.observe(id_)
    assert lookup.draft(1) == COPY[15:16]
    lookup.observe(COPY[15])
    assert lookup.draft(1) == COPY[16:17]
    for id_ in (98, 97):  # no copy any more
        lookup.observe(id_)
    assert lookup.draft(1) == []
    few = PromptLookup([*COPY, 7, 8, 9, *COPY[:2]])
    for id_ in (*COPY[2:6], 99):
        few.observe(id_)
    assert few.draft(1) == []


def test_the_latest_of_the_longest_matches_counts() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 50, 1, 2, 3, 4, 60, 3, 4, 70, 1, 2, 3, 4], FREE)
    assert lookup.draft(1) == [60]


def test_what_repeats_itself_is_drafted_beyond_its_end() -> None:
    assert PromptLookup([5, 6, 7] * 4, FREE).draft(5) == [5, 6, 7, 5, 6]


def test_an_image_is_never_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, -10, -11, 4, 1, 2], FREE)
    assert lookup.draft(5) == [3]
    lookup.observe(3)
    assert lookup.draft(5) == []


def test_drafting_stops_where_guesses_miss_and_begins_again() -> None:
    lookup = PromptLookup([*COPY, 7, *COPY[:8]])
    assert len(lookup.draft(100)) > 1
    for other in range(200, 230):
        lookup.observe(other)  # a miss
        for id_ in COPY[:8]:
            lookup.observe(id_)
        if other > 215:
            assert lookup.draft(100) == []
    for _ in range(2):
        for id_ in COPY:
            lookup.observe(id_)
    assert len(lookup.draft(100)) > 1


@pytest.mark.parametrize("rate", np.linspace(0, 1, 21))
def test_no_other_length_of_a_draft_pays_more(rate: float) -> None:
    costs = DraftCosts()
    gains = [sum(rate**n - costs.token for n in range(1, k + 1)) - costs.run * (k > 0) for k in range(costs.most + 1)]
    assert gains[draft_length(rate, costs)] == pytest.approx(max(gains))


def test_samples_are_distributed_as_without_drafts(eager: None) -> None:
    """Chi-square of the four tokens behind the first; at these seeds, with 255 degrees of freedom."""
    decoder, counts, drafted, accepted, total = ChainDecoder(), Counter[tuple[int, ...]](), 0, 0, 3000
    shares = np.exp(decoder.table) / np.exp(decoder.table).sum(axis=-1, keepdims=True)
    for seed in range(total):
        _, run = chain(decoder, seed=seed, max_tokens=4)
        counts[tuple(token.token_id for token in run)] += 1
        drafted += run.timings.drafted_tokens
        accepted += run.timings.accepted_tokens
    assert drafted > total / 3 and drafted / 10 < accepted < drafted * 0.9
    statistic = 0.0
    for place in np.ndindex(*[VOCAB] * 4):
        last, before, expected = CYCLE[-1], CYCLE[-2], float(total)
        for id_ in place:
            expected *= shares[before, last, id_]
            before, last = last, id_
        statistic += (counts[place] - expected) ** 2 / expected
    assert statistic < 255 + 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_same_seed_gives_the_same_answer(eager: None, temperature: float) -> None:
    for seed in range(20):
        options = {"temperature": temperature, "seed": seed, "max_tokens": 50}
        decoder, alone = ChainDecoder(), ChainDecoder()
        cached, run = chain(decoder, **options)
        tokens = [token.token_id for token in run]
        assert tokens == [token.token_id for token in chain(alone, prompt_lookup=False, **options)[1]]
        assert max(alone.chunks[1:]) == 1 < max(decoder.chunks[1:])
        assert decoder.ids == cached.keys.tolist() == [*CYCLE, *tokens[:-1]]  # nothing of a wrong guess stays


def test_no_guess_goes_beyond_the_end_of_the_answer(eager: None) -> None:
    for most in range(1, 8):
        decoder = ChainDecoder()
        assert len(list(chain(decoder, temperature=0, max_tokens=most)[1])) == most
        assert len(CYCLE) + most - 1 == decoder.length


def test_a_broken_off_check_and_an_early_end_leave_the_cache_true(eager: None) -> None:
    decoder = ChainDecoder()
    cached, run = chain(decoder, seed=1, max_tokens=50)
    next(run), next(run)
    run.close()
    assert decoder.ids == cached.keys.tolist()
    cached, run = chain(decoder, seed=1, max_tokens=50)
    next(run)
    decoder.fail = True
    with pytest.raises(EngineError, match="midway"):
        list(run)
    assert decoder.ids == cached.keys.tolist()[: decoder.length]


@pytest.mark.parametrize("engine", ["exact", "llama"])
@pytest.mark.usefixtures("eager")
def test_real_engines_answer_alike(engine: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(engine)
    drafted = 0
    ids = list(model.prompt("How much is 12+34? How much is 12+34?").ids)
    for seed, temperature in enumerate((0, 0.7, 1.5)):
        answers = []
        for lookup in (False, True):
            options = model.options(temperature=temperature, seed=seed, max_tokens=120, prompt_lookup=lookup)
            run = model.generate_tokens(ids, options=options)
            answers.append([token.token_id for token in run])
            drafted += run.timings.drafted_tokens
        assert answers[0] == answers[1]
        question = "What does the text say? What does the text say?"
        first, second = (
            model.generate(question, [PRICE], mode="think", options=model.options(seed=seed, prompt_lookup=lookup))
            for lookup in (False, True)
        )
        assert (first.text, first.thought) == (second.text, second.thought)
    assert drafted > 10


@pytest.mark.parametrize("engine", ["exact", "llama"])
@pytest.mark.usefixtures("eager")
def test_constraints_and_the_thinking_budget_hold(engine: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(engine)
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 6, "maxItems": 9}
    drafted = 0
    for seed in range(3):
        options = {"temperature": 2, "seed": seed, "thinking_budget": 6, "constraint": Constraint.json_schema(schema)}
        first, second = (
            model.generate("red, green, red", mode="think", options=model.options(prompt_lookup=lookup, **options))
            for lookup in (False, True)
        )
        assert first.text == second.text and first.thought == second.thought
        assert second.stats.thought_tokens <= 6
        drafted += second.stats.drafted_tokens
    assert drafted > 0


def test_the_option() -> None:
    model = phisight.load("demo", threads=1)
    assert not model.options().prompt_lookup
    model.prompt_lookup = True
    assert model.options().prompt_lookup
    assert not model.options(prompt_lookup=False).prompt_lookup
    with pytest.raises(InputError, match="prompt_lookup is 1"):
        model.options(prompt_lookup=1)
