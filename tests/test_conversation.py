"""Conversations on the built-in model: history, pictures, and what a next question costs."""

from __future__ import annotations

from pathlib import Path

import pytest

import phisight
from phisight.answer import Answer, collect
from phisight.conversation import Conversation
from phisight.errors import ImageError, PromptError
from phisight.prompt import PromptBuilder, user_message

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
QUESTION = "What is the value of the orange bar?"


@pytest.fixture(scope="module")
def model() -> phisight.Model:
    return phisight.load("demo", threads=1)


def ask(conversation: Conversation, text: str, model: phisight.Model, *images: Path, **rest: object) -> Answer:
    options = model.options(temperature=0, max_tokens=60)
    return collect(conversation.ask(text, images, options=options, **rest))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["auto", "think", "nothink"])
def test_a_second_question_pays_for_its_own_tokens(model: phisight.Model, mode: str) -> None:
    conversation = Conversation(model)
    first = ask(conversation, QUESTION, model, PICTURES / "chart.png", mode=mode)
    assert first.text == "3"  # as the picture shows
    assert bool(first.thought) == (mode == "think")
    second = ask(conversation, QUESTION, model, mode=mode)
    stats = second.stats
    # In the cache: the first prompt and the answer; its end token was drawn, but never run.
    held = first.stats.text_tokens + first.stats.image_tokens + first.stats.generated_tokens
    assert stats.reused_positions == held
    # To run: the turn's end, the new user turn, the opening of the answer. Nothing of the picture.
    # The first prompt's text had these too, with a newline behind the picture for the end of a turn.
    assert stats.prefill_positions == first.stats.text_tokens
    assert stats.cached_images == 1
    assert stats.text_tokens + stats.image_tokens == held + stats.prefill_positions


def test_the_answer_is_the_same_without_the_cache(model: phisight.Model) -> None:
    conversation = Conversation(model)
    ask(conversation, "What does the text say?", model, PICTURES / "price.png")
    second = ask(conversation, QUESTION, model, PICTURES / "chart.png")
    fresh = Conversation(phisight.load("demo", threads=1))
    ask(fresh, "What does the text say?", model, PICTURES / "price.png")
    fresh._model._decoder.forget()
    assert ask(fresh, QUESTION, model, PICTURES / "chart.png").text == second.text


def test_history_keeps_thought_and_answer_apart(model: phisight.Model) -> None:
    conversation = Conversation(model, system="Be exact.")
    answer = ask(conversation, QUESTION, model, PICTURES / "chart.png", mode="think")
    system, question, said = conversation.messages
    assert system == {"role": "system", "content": "Be exact."}
    assert question["role"] == "user"
    assert said == {"role": "assistant", "content": answer.text, "reasoning_content": answer.thought}
    conversation.reset()
    assert conversation.messages == ({"role": "system", "content": "Be exact."},)


def test_a_turn_that_fails_changes_nothing(model: phisight.Model, tmp_path: Path) -> None:
    conversation = Conversation(model)
    ask(conversation, QUESTION, model, PICTURES / "chart.png")
    before = conversation.messages
    with pytest.raises(ImageError):
        ask(conversation, "And this?", model, tmp_path / "none.png")
    with pytest.raises(PromptError, match="1024"):
        ask(conversation, "word " * 2000, model)
    assert conversation.messages == before
    assert ask(conversation, QUESTION, model).text


def test_a_closed_or_cancelled_answer(model: phisight.Model) -> None:
    conversation = Conversation(model)
    options = model.options(temperature=0)
    stream = conversation.ask(QUESTION, [PICTURES / "chart.png"], mode="think", options=options)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert conversation.messages == ()
    assert collect(conversation.ask("?", options=options, cancel=lambda: True)).finish_reason == "cancelled"
    assert conversation.messages == ()
    asked = 0

    def after_three_tokens() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    partial = collect(conversation.ask(QUESTION, [PICTURES / "chart.png"], mode="think", cancel=after_three_tokens))
    assert partial.finish_reason == "cancelled"
    assert conversation.messages[-1]["content"] == partial.text
    assert ask(conversation, QUESTION, model).finish_reason == "stop"


def test_a_stop_text_is_not_kept(model: phisight.Model) -> None:
    conversation = Conversation(model)
    options = model.options(temperature=0, stop=(".",))
    answer = collect(conversation.ask("What does the text say?", [PICTURES / "price.png"], options=options))
    assert (answer.text, answer.finish_reason) == ("$6", "stop")
    assert str(conversation.messages[-1]["content"]).endswith("$6")
    second = ask(conversation, "What does the text say?", model)
    assert second.stats.cached_images == 1
    assert second.stats.reused_positions >= answer.stats.text_tokens + answer.stats.image_tokens


def test_an_answer_cut_in_its_thought_is_closed_in_the_history(model: phisight.Model) -> None:
    conversation = Conversation(model)
    options = model.options(temperature=0, max_tokens=2)
    cut = collect(conversation.ask(QUESTION, [PICTURES / "chart.png"], mode="think", options=options))
    assert (cut.finish_reason, cut.text) == ("length", "")
    assert cut.thought
    prompt = conversation._prompt([*conversation.messages, user_message("And now?")], 1, "auto")
    end = model.tokenizer.id_of("</think>")
    assert list(prompt.ids).count(end) == 1
    rendered = model.prompt([*conversation.messages, user_message("And now?")], 1)
    assert conversation._history._letters(prompt.ids) == conversation._history._letters(rendered.ids)


def test_a_template_that_drops_old_thoughts_has_its_way(model: phisight.Model) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    )
    other = phisight.load("demo", threads=1)
    other.prompts = PromptBuilder(other.tokenizer, template)
    conversation = Conversation(other)
    assert ask(conversation, QUESTION, other, PICTURES / "chart.png", mode="think").thought
    prompt = conversation._prompt([*conversation.messages, user_message("And now?")], 1, "auto")
    assert other.tokenizer.id_of("<think>") not in prompt.ids
