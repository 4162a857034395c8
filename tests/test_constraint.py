"""Which tokens a schema or grammar lets through: the mask, the sampler under it, the rule for thought and answer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import phisight
from phisight.constraint import AnswerRule, Constraint, Mask
from phisight.constraint_llguidance import Compiler, LlguidanceMatcher, check_constraint
from phisight.errors import EngineError, InputError
from phisight.options import GenerateOptions
from phisight.prompt import DIRECT, THINK, THINK_END
from phisight.sampling import Sampler
from phisight.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_file(Path(phisight.__file__).parent / "demo/onnx/tokenizer.json")
CONTROL = TOKENIZER.control_tokens
STOP = CONTROL["<|im_end|>"]
OBJECT = {"type": "object", "properties": {"ä": {"type": "integer"}}, "required": ["ä"], "additionalProperties": False}


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(TOKENIZER, frozenset({STOP}))


def behind(matcher: LlguidanceMatcher, text: str) -> LlguidanceMatcher:
    """The matcher, after it took a text."""
    for token_id in TOKENIZER.encode(text, parse_special=False):
        matcher.advance(token_id)
    return matcher


def beginnings(*parts: bytes) -> re.Pattern[bytes]:
    """Matches every beginning of a text that consists of the parts, each a pattern for bytes."""
    pattern = b""
    for part in reversed(parts):
        pattern = b"(?:" + part + pattern + b")?"
    return re.compile(pattern)


@pytest.mark.parametrize("text", ["", "{", '{"', '{"ä', '{"ä":', '{"ä": ', '{"ä": 1', '{"ä": 12}'])
def test_the_mask_lets_through_what_the_schema_says(compiler: Compiler, text: str) -> None:
    """Token by token: parts of a character, numbers with a token of their own, control tokens."""
    blank = rb"(?: |\n[ \t]*)?"
    start = beginnings(
        rb"\{", blank, b'"', b"\xc3", b"\xa4", b'"', blank, b":", blank, b"-?", b"(?:0|[1-9][0-9]*)", blank, rb"\}"
    )
    mask = behind(compiler.compile(Constraint.json_schema(OBJECT)), text).allowed()
    fits = [
        id_ not in CONTROL.values() and start.fullmatch(text.encode() + TOKENIZER.token_bytes(id_)) is not None
        for id_ in range(TOKENIZER.vocab_size)
    ]
    fits[STOP] = text == '{"ä": 12}'
    assert np.flatnonzero(mask).tolist() == np.flatnonzero(fits).tolist()
    assert mask.any()


def test_a_whole_text_is_complete_and_one_that_may_go_on_is_not(compiler: Compiler) -> None:
    assert behind(compiler.compile(Constraint.json_schema(OBJECT)), '{"ä": 12}').complete
    number = behind(compiler.compile(Constraint.json_schema({"type": "integer"})), "12")
    assert number.allowed()[STOP] and not number.complete


def test_json_may_be_laid_out_but_not_with_blanks_for_ever(compiler: Compiler) -> None:
    for text in ('{"a":[1,2]}', '{"a": [1, 2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}'):
        assert behind(compiler.compile(Constraint.json_object()), text).complete
    with pytest.raises(EngineError, match="does not fit the grammar"):
        behind(compiler.compile(Constraint.json_object()), '{"a":' + "\n" * 40)


def test_a_grammar_cannot_name_control_tokens(compiler: Compiler) -> None:
    with pytest.raises(InputError, match="unknown special token"):
        compiler.compile(Constraint.grammar("start: <think>"))
    matcher = compiler.compile(Constraint.grammar(f"start: <[{CONTROL[THINK]}]>"))
    with pytest.raises(EngineError, match="no token may follow"):
        matcher.allowed()


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.json_schema({"type": "objekt"}), "the JSON schema cannot be used: Invalid type: objekt"),
        (Constraint.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (Constraint.json_schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
        (Constraint.json_schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (Constraint.json_schema({"$ref": "http://127.0.0.1/schema"}), "does not fetch"),
        (Constraint.json_schema({"oneOf": [{"type": "string"}, {"maxLength": 2}]}), "x-guidance"),
        (Constraint.grammar('start: "a" b'), 'the grammar cannot be used: at 1(8): unknown name: "b"'),
        (Constraint.grammar(""), "Empty grammar"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(compiler: Compiler, constraint: Constraint, message: str) -> None:
    for refuse in (compiler.compile, check_constraint):
        with pytest.raises(InputError) as caught:
            refuse(constraint)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is of type list"),
        ("true", "is of type bool"),
        ("[" * 100_000, "is not JSON"),
        ({"a": {1, 2}}, "cannot be written as JSON"),
        ({"maximum": float("inf")}, "cannot be written as JSON"),
    ],
)
def test_a_schema_that_is_no_object_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Constraint.json_schema(schema)


def test_text_and_object_of_a_schema_are_the_same() -> None:
    assert Constraint.json_schema(json.dumps(OBJECT)) == Constraint.json_schema(OBJECT)
    with pytest.raises(InputError, match=r"give a Constraint, such as Constraint.json_object\(\)"):
        GenerateOptions(constraint=OBJECT)  # type: ignore[arg-type]


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=r"phisight\[schema\]"):
        check_constraint(Constraint.json_object())
    with pytest.raises(EngineError, match=r"phisight\[schema\]"):
        Compiler(TOKENIZER, frozenset({STOP}))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 400),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    penalty=st.sampled_from([1.0, 1.5]),
)
def test_under_a_mask_the_sampler_knows_the_allowed_tokens_alone(
    seed: int, size: int, temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float
) -> None:
    """As if the vocabulary were made of them; ids beyond the tokenizer's are not drawn."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, size + 7).astype(np.float32)
    logits[size:] = 50
    allowed = random.random(size) < random.random()
    allowed[random.integers(size)] = True
    options = GenerateOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    seen = random.integers(0, size, 5)
    whole, few = Sampler(options, size + 7, size), Sampler(options, int(allowed.sum()))
    whole.observe(seen)
    places = np.flatnonzero(allowed)
    few.observe(np.flatnonzero(np.isin(places, seen)))
    ids, probabilities = whole.distribution(logits, allowed)
    expected, of_few = few.distribution(logits[places])
    assert ids.tolist() == places[expected].tolist()
    np.testing.assert_allclose(probabilities, of_few, rtol=1e-6)
    for _ in range(5):
        assert whole.sample(logits, allowed) in ids


def test_a_mask_that_allows_nothing_is_an_error() -> None:
    sampler = Sampler(GenerateOptions(), 10, 5)
    mask = np.zeros(10, dtype=np.bool_)
    mask[7] = True  # beyond the tokenizer
    with pytest.raises(EngineError, match="no token may be drawn"):
        sampler.sample(np.zeros(10, dtype=np.float32), mask)


class OneToken:
    """A matcher that allows one token, as often as it likes."""

    complete = False

    def __init__(self, token_id: int) -> None:
        self.taken: list[int] = []
        self._mask = np.zeros(TOKENIZER.vocab_size, dtype=np.bool_)
        self._mask[token_id] = True

    def allowed(self) -> Mask:
        return self._mask

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)


def greedy(logits: NDArray[np.float32], mask: Mask | None) -> int:
    return int(np.where(True if mask is None else mask, logits, -np.inf).argmax())


def wanting(*tokens: int) -> NDArray[np.float32]:
    """Logits that prefer the first of some tokens, then the next."""
    logits = np.zeros(TOKENIZER.vocab_size, dtype=np.float32)
    for rank, token_id in enumerate(tokens):
        logits[token_id] = 10 - rank
    return logits


def test_a_thought_is_free_but_cannot_end_the_answer() -> None:
    matcher = OneToken(5)
    rule = AnswerRule(matcher, TOKENIZER, frozenset({STOP}), "think")
    for token_id in (7, CONTROL[THINK], CONTROL[DIRECT], 9):
        assert rule.draw(wanting(STOP, token_id), greedy) == token_id
        rule.observe(token_id)
    assert matcher.taken == []
    rule.observe(CONTROL[THINK_END])
    assert rule.draw(wanting(STOP, 7, CONTROL[THINK]), greedy) == 5
    rule.observe(5)
    assert matcher.taken == [5]


@pytest.mark.parametrize("opening", [THINK, DIRECT])
def test_whether_to_think_is_the_models_choice_once(opening: str) -> None:
    matcher = OneToken(5)
    rule = AnswerRule(matcher, TOKENIZER, frozenset({STOP}), "auto")
    assert rule.draw(wanting(7, CONTROL[opening]), greedy) == 5  # the model chose to answer
    assert rule.draw(wanting(STOP, CONTROL[opening]), greedy) == 5
    assert rule.draw(wanting(CONTROL[opening], 7), greedy) == CONTROL[opening]
    rule.observe(CONTROL[opening])
    assert matcher.taken == []
    assert rule.draw(wanting(7), greedy) == (7 if opening == THINK else 5)
    rule.observe(CONTROL[THINK_END] if opening == THINK else 5)
    assert rule.draw(wanting(CONTROL[opening]), greedy) == 5


def test_a_direct_answer_begins_at_once() -> None:
    rule = AnswerRule(OneToken(5), TOKENIZER, frozenset({STOP}), "nothink")
    assert rule.draw(wanting(CONTROL[THINK], 7), greedy) == 5
