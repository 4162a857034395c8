"""Answers of the built-in model under a schema or grammar, through ONNX Runtime and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import phisight
from phisight.answer import Answer
from phisight.constraint import Constraint
from phisight.conversation import Conversation
from phisight.errors import InputError
from phisight.model import Model
from phisight.prompt import THINK_END, Mode

DEMO = Path(phisight.__file__).parent / "demo"
PRICE, BUTTONS = DEMO / "pictures/price.png", DEMO / "pictures/buttons.png"
QUESTION = "What does the text say?"
TEXT = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"text": TEXT, "price": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["text", "price"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"enum": ["red", "green", None, 3]}, "minItems": 1, "maxItems": 4},
    "choice": {"anyOf": [{"const": "yes"}, {"const": "no"}, {"type": "boolean"}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "nested": {
        "$defs": {"point": {"type": "array", "prefixItems": [TEXT, {"type": "null"}], "minItems": 2, "maxItems": 2}},
        "type": "object",
        "properties": {"é": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2}},
        "required": ["é"],
        "additionalProperties": False,
    },
}
MODES: tuple[Mode, ...] = ("auto", "think", "nothink")


@pytest.fixture(scope="module")
def model() -> Model:
    return phisight.load("demo", threads=1)


@pytest.fixture(scope="module")
def llama(exported_gguf: Callable[..., Path]) -> Model:
    pytest.importorskip("llama_cpp")
    return phisight.load(exported_gguf(DEMO / "checkpoint", decoder="F32"), threads=1)


def ask(model: Model, constraint: Constraint | None, mode: Mode = "auto", **options: Any) -> Answer:
    """A question about the price."""
    chosen = model.options(**{"max_tokens": 300, "temperature": 0, "constraint": constraint, **options})
    return model.generate(QUESTION, [PRICE], mode=mode, options=chosen)


def check(answer: Answer, schema: dict[str, Any]) -> None:
    assert answer.finish_reason == "stop", answer.text
    jsonschema.validate(json.loads(answer.text), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_parses_and_fits(model: Model, name: str) -> None:
    """200 answers in all, most of them at temperatures at which the model talks nonsense."""
    constraint, texts = Constraint.json_schema(SCHEMAS[name]), set()
    for seed in range(40):
        answer = ask(
            model,
            constraint,
            MODES[seed * 3 // 40],
            temperature=(1, 3, 10)[seed % 3],
            top_p=1,
            seed=seed,
            thinking_budget=8,
        )
        check(answer, SCHEMAS[name])
        texts.add(answer.text)
    assert len(texts) > 3  # the model chooses


@pytest.mark.parametrize("name", ["object", "nested"])
def test_llama_cpp_answers_under_a_schema(llama: Model, name: str) -> None:
    for seed, mode in enumerate(MODES):
        answer = ask(llama, Constraint.json_schema(SCHEMAS[name]), mode, temperature=3, seed=seed, thinking_budget=8)
        check(answer, SCHEMAS[name])


def test_any_object_is_an_object_or_the_beginning_of_one(model: Model) -> None:
    for seed in range(10):
        answer = ask(model, Constraint.json_object(), temperature=2, seed=seed, max_tokens=60, thinking_budget=0)
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert answer.text.startswith("{")


def test_a_grammar_is_kept_and_its_end_costs_no_step(model: Model) -> None:
    grammar = Constraint.grammar(r'start: "it says " PRICE "!"' + "\n" + r"PRICE: /\$[0-9]\.[0-9]{2}/")
    answer = ask(model, grammar, mode="nothink")
    assert answer.finish_reason == "stop"
    assert answer.text.startswith("it says $") and answer.text.endswith("!")
    assert answer.stats.decode_steps == answer.stats.generated_tokens - 1


def test_the_thought_is_what_it_would_be_without_a_form(model: Model) -> None:
    free, bound = (ask(model, c, "think") for c in (None, Constraint.json_schema(SCHEMAS["list"])))
    assert free.thought and bound.thought == free.thought
    check(bound, SCHEMAS["list"])


def test_whether_to_think_does_not_depend_on_the_form(model: Model) -> None:
    thoughts = []
    for question in ("How much is 27+35?", "How much is 8+61?", "What is 7-3?", "Hello"):
        for constraint in (None, Constraint.json_schema(SCHEMAS["object"])):
            options = model.options(temperature=0, max_tokens=200, constraint=constraint)
            thoughts.append(model.generate(question, options=options).thought)
    assert thoughts[::2] == thoughts[1::2]
    assert any(thoughts)


@pytest.mark.parametrize("budget", [0, 3])
def test_the_budget_cuts_the_thought_and_the_answer_fits(model: Model, budget: int) -> None:
    answer = ask(model, Constraint.json_schema(SCHEMAS["object"]), "think", thinking_budget=budget)
    assert answer.stats.thought_tokens == budget
    check(answer, SCHEMAS["object"])


def test_a_quoted_end_of_a_thought_ends_nothing(model: Model) -> None:
    """Text that spells the control token, in the answer: no thought is cut and nothing is lost."""
    quoted = Constraint.grammar(f'start: "[{THINK_END}]"')
    answer = ask(model, quoted, "nothink")
    assert (answer.text, answer.thought) == (f"[{THINK_END}]", "")


def test_a_length_stop_leaves_a_beginning(model: Model) -> None:
    constraint = Constraint.json_schema(SCHEMAS["object"])
    whole = ask(model, constraint, "nothink")
    tokens = whole.stats.generated_tokens
    assert ask(model, constraint, "nothink", max_tokens=tokens).finish_reason == "stop"
    cut = ask(model, constraint, "nothink", max_tokens=tokens - 1)
    assert cut.finish_reason == "length"
    assert whole.text.startswith(cut.text)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


def test_stop_texts_and_the_repetition_penalty_work_as_ever(model: Model) -> None:
    constraint = Constraint.json_schema(SCHEMAS["object"])
    whole = ask(model, constraint, "nothink")
    stopped = ask(model, constraint, "nothink", stop=("price",))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text.partition("price")[0]
    penalised = ask(model, constraint, "nothink", repetition_penalty=5)
    check(penalised, SCHEMAS["object"])
    assert penalised.text != whole.text


def test_a_seed_names_one_answer(model: Model) -> None:
    first, second = (ask(model, Constraint.json_object(), temperature=1, seed=3, max_tokens=40) for _ in range(2))
    assert first.text == second.text


def test_a_bad_schema_is_refused_before_any_work(model: Model) -> None:
    options = model.options(constraint=Constraint.json_schema({"type": "objekt"}))
    with pytest.raises(InputError, match="objekt"):
        model.stream(QUESTION, [PRICE], options=options)  # not iterated
    with pytest.raises(InputError, match="objekt"):
        model.generate_tokens([1, 2], options=options)


def test_ids_are_continued_under_a_schema(model: Model) -> None:
    prompt = model.prompt("Hello", mode="think")
    options = model.options(temperature=0, max_tokens=200, constraint=Constraint.json_schema(SCHEMAS["choice"]))
    ids = [t.token_id for t in model.generate_tokens(prompt.ids, options=options, starts_in_thought=True)]
    end = model.tokenizer.id_of(THINK_END)
    assert end is not None
    answer = json.loads(model.tokenizer.decode(ids[ids.index(end) + 1 :]))
    jsonschema.validate(answer, SCHEMAS["choice"])


def test_a_conversation_goes_on_behind_an_answer_of_a_form(model: Model) -> None:
    conversation = Conversation(model)
    form = model.options(temperature=0, max_tokens=100, constraint=Constraint.json_schema(SCHEMAS["object"]))
    first = list(conversation.ask(QUESTION, [PRICE], mode="nothink", options=form))
    second = list(conversation.ask(QUESTION, mode="nothink", options=model.options(temperature=0, max_tokens=20)))
    stats = second[-1].stats
    assert stats is not None
    # The whole first turn but its last token, which was not run, is in the cache.
    assert stats.reused_positions >= stats.image_tokens + len(first[-1].token_ids)
    json.loads("".join(chunk.text for chunk in first))
