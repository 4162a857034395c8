"""A loaded model from top to bottom, on the built-in one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

import phisight
from phisight.answer import Chunk, collect
from phisight.backends.base import Decoder, LogitsWanted, Piece, VisionEncoder
from phisight.errors import Cancelled, ImageError, InputError, PromptError
from phisight.model import Model
from phisight.naflex import Patches
from phisight.prompt import Message, user_message

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
PRICE = PICTURES / "price.png"  # 128 x 64: 8 x 4 patches
CHART = PICTURES / "chart.png"  # 128 x 96: 8 x 6 patches
BUTTONS = PICTURES / "buttons.png"  # 128 x 128: 8 x 8 patches
QUESTION = "What does the text say?"
BAR = "What is the value of the orange bar?"
TOKEN_BYTES = 256 * 4  # of an image token: the built-in model's width in float32


@pytest.fixture(scope="module")
def model() -> Model:
    return phisight.load("demo", threads=1)


class CountingEncoder:
    """Remembers how many patches each call encoded."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.calls: list[int] = []

    @property
    def hidden_size(self) -> int:
        return self._encoder.hidden_size

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        self.calls.append(patches.num_patches)
        return self._encoder.encode(patches)


def counted(context: int | None = None) -> tuple[Model, CountingEncoder]:
    """A model of its own, and its encoder."""
    model = phisight.load("demo", threads=1, context=context)
    encoder = CountingEncoder(model._encoder.engine)
    model._encoder.engine = encoder
    return model, encoder


class WideDecoder:
    """A decoder with more logits than the tokenizer has tokens, the likeliest of all among them."""

    extra = 8

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.hidden_size = decoder.hidden_size
        self.vocab_size = decoder.vocab_size + self.extra

    @property
    def length(self) -> int:
        return self._decoder.length

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        self._decoder.reserve(capacity, largest_image)

    def truncate(self, length: int) -> None:
        self._decoder.truncate(length)

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        rows = self._decoder.append(pieces, logits, causal=causal)
        return np.pad(rows, ((0, 0), (0, self.extra)), constant_values=1000.0)


# images


def test_an_image_is_encoded_once() -> None:
    model, encoder = counted()
    first = model.generate(QUESTION, [PRICE])
    second = model.generate("And again?", [PRICE.read_bytes(), CHART])
    assert encoder.calls == [32, 48]
    assert (first.stats.images, first.stats.cached_images) == (1, 0)
    assert (second.stats.images, second.stats.cached_images) == (2, 1)
    model.score(model.prompt(QUESTION, 1).ids, [model.preprocess(PRICE)])
    assert encoder.calls == [32, 48]


def test_the_features_used_least_recently_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = counted()
    monkeypatch.setattr("phisight.cached_encoder.FEATURE_CACHE_BYTES", (32 + 64) * TOKEN_BYTES)
    price, chart, buttons = (model.preprocess(picture) for picture in (PRICE, CHART, BUTTONS))
    for patches in (price, chart, price, buttons, price):  # buttons take the place of chart
        model.encode_image(patches)
    assert encoder.calls == [32, 48, 64]
    model.encode_image(chart)
    assert encoder.calls == [32, 48, 64, 48]


def test_the_last_image_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = counted()
    monkeypatch.setattr("phisight.cached_encoder.FEATURE_CACHE_BYTES", 1)
    answer = model.generate(QUESTION, [PRICE, CHART])
    assert answer.stats.image_tokens == 32 + 48
    model.generate(QUESTION, [CHART])
    assert encoder.calls == [32, 48]


def test_a_picture_on_its_side_is_seen_upright(model: Model) -> None:
    with Image.open(PRICE) as upright:
        lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown upright after a quarter turn to the right
    photo = io.BytesIO()
    lying.save(photo, "PNG", exif=exif)
    assert model.preprocess(photo).digest == model.preprocess(PRICE).digest != model.preprocess(lying).digest
    assert model.generate(QUESTION, [photo], options=model.options(temperature=0)).text == "$6.75"


def test_hidden_colours_are_not_seen(model: Model) -> None:
    with Image.open(CHART) as picture:
        pixels = np.array(picture)
    background = (pixels == 248).all(axis=-1)
    assert background.mean() > 0.5
    shown = np.where(background[..., None], np.uint8(255), pixels)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    hidden = np.where(background[..., None], noise, pixels)
    transparent = np.dstack([hidden, np.where(background, 0, 255).astype(np.uint8)])
    file = io.BytesIO()
    Image.fromarray(transparent).save(file, "PNG")
    assert model.preprocess(file).digest == model.preprocess(shown).digest != model.preprocess(hidden).digest
    assert model.generate(BAR, [file], options=model.options(temperature=0)).text == "3"


def test_the_budget_of_patches(model: Model) -> None:
    assert model.preprocess(BUTTONS).num_patches == 64
    assert model.preprocess(BUTTONS, 64).digest == model.preprocess(BUTTONS).digest
    assert model.preprocess(BUTTONS, 16).grid == (4, 4)  # below the model's fewest, as asked for
    assert model.generate(QUESTION, [BUTTONS], max_patches=16).stats.image_tokens == 16
    patches = model.preprocess(BUTTONS)
    assert model.preprocess(patches, 16) is patches


@pytest.mark.parametrize("most", [145, 3600, 0, -1])
def test_more_patches_than_in_training_are_refused(most: int) -> None:
    model, encoder = counted()
    with pytest.raises(InputError, match=f"max_patches is {most}, wanted 1 to 144"):
        model.stream(QUESTION, [PRICE], max_patches=most)
    assert encoder.calls == []


# the question


def test_a_string_is_a_question_about_all_images(model: Model) -> None:
    options = model.options(temperature=0)
    parts: list[Message] = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "\n"},
                {"type": "image_url"},
                {"type": "text", "text": f"\n{BAR}"},
            ],
        }
    ]
    assert model.prompt(parts, 2) == model.prompt(BAR, 2) == model.prompt([user_message(BAR, 2)], 2)
    answers = [model.generate(messages, [PRICE, CHART], options=options).text for messages in (parts, BAR)]
    assert answers[0] == answers[1]


def test_an_image_stands_where_its_part_stands(model: Model) -> None:
    content = [{"type": "text", "text": BAR}, {"type": "image"}]
    prompt = model.prompt([{"role": "user", "content": content}], 1)
    text = list(model.tokenizer.encode(BAR, parse_special=False))
    place = prompt.ids.index(-200)
    assert list(prompt.ids[place - len(text) : place]) == text


def test_what_is_wrong_is_said_before_the_encoder_runs(tmp_path: Path) -> None:
    model, encoder = counted()
    with pytest.raises(PromptError, match="1 image slots, but 2 images"):
        model.stream([user_message(QUESTION, 1)], [PRICE, CHART])
    with pytest.raises(PromptError, match="0 image slots, but 1 images"):
        model.stream([{"role": "user", "content": "<image>What is this?"}], [PRICE])
    missing = tmp_path / "none.png"
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        model.stream(QUESTION, [PRICE, missing])
    assert encoder.calls == []


def test_the_context_is_checked_before_the_encoder_runs() -> None:
    # The prompt: 16 positions of text, 32 of the picture; its image slot is neither.
    model, encoder = counted(context=48)
    assert model.context == 48
    numbers = r"takes 48 positions \(16 text and 32 image tokens\) with 20 new .*context holds 48"
    with pytest.raises(PromptError, match=numbers):
        model.stream(QUESTION, [PRICE], options=model.options(max_tokens=20))
    assert encoder.calls == []
    model, encoder = counted(context=49)
    answer = model.generate(QUESTION, [PRICE])
    assert (answer.finish_reason, answer.stats.generated_tokens, encoder.calls) == ("length", 1, [32])


def test_a_prompt_is_never_cut(model: Model) -> None:
    with pytest.raises(PromptError, match=r"takes \d{4} positions .*context holds 1024"):
        model.stream("word " * 1024)


@pytest.mark.parametrize("context", [1, 0, 1025])
def test_a_context_that_the_model_does_not_have(context: int) -> None:
    with pytest.raises(PromptError, match=f"context is {context} positions, wanted 2 to the model's 1024"):
        phisight.load("demo", threads=1, context=context)


# the answer


@pytest.mark.parametrize("mode", ["auto", "think", "nothink"])
def test_the_chunks_are_the_answer(model: Model, mode: phisight.prompt.Mode) -> None:
    options = model.options(temperature=0)
    chunks = list(model.stream(QUESTION, [PRICE], mode=mode, options=options))
    answer = model.generate(QUESTION, [PRICE], mode=mode, options=options)
    assert answer.text == "".join(chunk.text for chunk in chunks if chunk.channel == "answer") == "$6.75"
    assert answer.thought == "".join(chunk.text for chunk in chunks if chunk.channel == "thought")
    assert answer.thought == ("$ 6 . 7 5" if mode == "think" else "")
    *body, last = chunks
    assert all(chunk.text and chunk.stats is None and chunk.finish_reason is None for chunk in body)
    assert [chunk.channel for chunk in body] == sorted((chunk.channel for chunk in body), reverse=True)
    assert (last.text, last.finish_reason) == ("", "stop")
    assert answer.finish_reason == "stop"


def test_the_counts_add_up() -> None:
    model, _ = counted()
    options = model.options(temperature=0)
    *_, last = model.stream(QUESTION, [PRICE], mode="think", options=options)
    stats = last.stats
    assert stats is not None
    assert (stats.text_tokens, stats.image_tokens) == (17, 32)
    assert (stats.reused_positions, stats.prefill_positions) == (0, 49)
    # "$ 6 . 7 5" are 8 tokens, then </think>, then $ 6 . 7 5; the end token is drawn by a run, but is not one of them.
    assert (stats.thought_tokens, stats.generated_tokens, stats.decode_steps) == (8, 14, 14)
    assert model.tokenizer.decode(last.token_ids) == "$ 6 . 7 5</think>$6.75"
    assert len(last.token_ids) == 14
    again = model.generate(QUESTION, [PRICE], mode="think", options=options).stats
    assert (again.reused_positions, again.prefill_positions) == (48, 1)
    cut = model.generate(QUESTION, [PRICE], mode="think", options=replace(options, max_tokens=3))
    assert (cut.thought, cut.text, cut.finish_reason) == ("$ 6", "", "length")
    assert (cut.stats.generated_tokens, cut.stats.decode_steps) == (3, 2)  # the last one is not run


def test_greedy_answers_do_not_depend_on_what_was_asked_before(model: Model) -> None:
    fresh = phisight.load("demo", threads=1)
    for question, picture in [(BAR, CHART), (QUESTION, PRICE), (BAR, CHART)]:
        for chunk in (256, 7):
            options = model.options(temperature=0, prefill_chunk=chunk)
            *_, last = model.stream(question, [picture], mode="think", options=options)
            fresh._decoder.forget()
            *_, wanted = fresh.stream(question, [picture], mode="think", options=fresh.options(temperature=0))
            assert last.token_ids == wanted.token_ids


def test_a_seed_repeats_an_answer(model: Model) -> None:
    options = model.options(temperature=3, top_p=1, max_tokens=20)
    answers = [model.generate(QUESTION, [PRICE], options=replace(options, seed=seed)) for seed in (0, 1, 2, 3)]
    assert len({answer.text for answer in answers}) == 4
    assert [answer.stats.seed for answer in answers] == [0, 1, 2, 3]
    assert model.generate(QUESTION, [PRICE], options=replace(options, seed=2)).text == answers[2].text
    drawn = model.generate(QUESTION, [PRICE], options=options)
    repeated = model.generate(QUESTION, [PRICE], options=replace(options, seed=drawn.stats.seed))
    assert repeated.text == drawn.text


def test_the_checkpoints_defaults_are_the_options(model: Model) -> None:
    options = model.options()
    assert (options.temperature, options.top_p) == (0.0, 1.0)  # "do_sample": false
    assert model.options(temperature=0.5).top_p == 1.0


@pytest.mark.parametrize(
    ("stop", "text"), [((".",), "$6"), (("6.7",), "$"), (("$",), ""), (("75", "."), "$6"), (("5x",), "$6.75")]
)
def test_a_stop_text_ends_the_answer(model: Model, stop: tuple[str, ...], text: str) -> None:
    options = model.options(temperature=0, stop=stop)
    *body, last = model.stream(QUESTION, [PRICE], mode="nothink", options=options)
    assert ("".join(chunk.text for chunk in body), last.finish_reason) == (text, "stop")
    # The tokens end with the one that completes the stop text: $ 6 . 7 5 are one each.
    whole = next((found for found in ("$", "$6.", "$6.7") if found.endswith(stop)), "$6.75")
    assert model.tokenizer.decode(last.token_ids) == whole


def test_a_stop_text_within_the_thought_ends_nothing(model: Model) -> None:
    answer = model.generate(QUESTION, [PRICE], mode="think", options=model.options(temperature=0, stop=(" .", "75")))
    assert (answer.thought, answer.text, answer.finish_reason) == ("$ 6 . 7 5", "$6.", "stop")


@pytest.mark.parametrize(("budget", "thought"), [(0, ""), (1, "$"), (3, "$ 6"), (8, "$ 6 . 7 5"), (9, "$ 6 . 7 5")])
def test_a_thinking_budget_closes_the_thought(model: Model, budget: int, thought: str) -> None:
    options = model.options(temperature=0, thinking_budget=budget)
    *body, last = model.stream(QUESTION, [PRICE], mode="think", options=options)
    assert "".join(chunk.text for chunk in body if chunk.channel == "thought") == thought
    assert "".join(chunk.text for chunk in body if chunk.channel == "answer") == "$6.75"
    assert last.finish_reason == "stop"
    assert last.stats is not None
    assert last.stats.thought_tokens == min(budget, 8)
    assert last.token_ids[min(budget, 8)] == model.tokenizer.id_of("</think>")


def test_what_stands_elsewhere_is_noted(model: Model) -> None:
    system: Message = {"role": "system", "content": "Be exact."}
    answer = model.generate([system, user_message(QUESTION, 1)], [PRICE])
    (note,) = answer.notes
    assert "system message" in note
    assert "Be exact." in model.prompt([system, user_message(QUESTION, 1)], 1).text
    assert model.generate(QUESTION, [PRICE]).notes == ()
    assert [note.split(":")[0].split()[-1] for note in model.notes[:2]] == ["cpu", "threads"]


def test_only_the_tokenizers_ids_are_drawn(model: Model) -> None:
    decoder = phisight.load("demo", threads=1)._decoder._decoder
    wide = Model(
        model.manifest, model.tokenizer, model.prompts, model._encoder.engine, WideDecoder(decoder), context=1024
    )
    assert wide.score([1, 2, 3]).shape == (3, 840)
    for options in (model.options(temperature=0), model.options(temperature=0.01, seed=0)):
        assert wide.generate(QUESTION, [PRICE], options=options).text == "$6.75"


def test_score_agrees_with_the_answer(model: Model) -> None:
    prompt = model.prompt(QUESTION, 1, mode="think")
    patches = [model.preprocess(PRICE)]
    scores = model.score(prompt.ids, patches)
    assert (scores.shape, scores.dtype) == ((49, 832), np.float32)
    options = model.options(temperature=0, max_tokens=5)
    tokens = [token.token_id for token in model.generate_tokens(prompt.ids, patches, options, starts_in_thought=True)]
    # Every row is for the token that follows.
    rows = model.score([*prompt.ids, *tokens[:-1]], patches)[-5:].argmax(axis=-1)
    assert scores[-1].argmax() == tokens[0]
    assert rows.tolist() == tokens
    *_, last = model.stream(QUESTION, [PRICE], mode="think", options=options)
    assert list(last.token_ids) == tokens


# cancel


def test_cancel_between_two_images() -> None:
    model, encoder = counted()
    chunks = list(model.stream(QUESTION, [PRICE, CHART], mode="think", cancel=lambda: len(encoder.calls) == 1))
    answer = collect(chunks)
    assert len(chunks) == 1
    assert (answer.text, answer.thought, answer.finish_reason) == ("", "", "cancelled")
    assert encoder.calls == [32]
    stats = answer.stats
    assert (stats.images, stats.image_tokens, stats.prefill_positions, stats.generated_tokens) == (2, 80, 0, 0)
    assert stats.seed is None
    assert not any("None" in line for line in stats.lines())
    prompt = model.prompt(QUESTION, 2)
    with pytest.raises(Cancelled, match="after 0 of 2 images"):
        model.generate_tokens(prompt.ids, [model.preprocess(PRICE), model.preprocess(CHART)], cancel=lambda: True)
    # What was encoded is kept, and the model answers.
    assert model.generate(QUESTION, [PRICE], options=model.options(temperature=0)).text == "$6.75"
    assert encoder.calls == [32]


def test_cancel_within_the_prompt() -> None:
    model, _ = counted()
    run: list[int] = []
    chunks = model.stream(
        QUESTION,
        [PRICE],
        options=model.options(prefill_chunk=10),
        progress=lambda stage, done, total: run.append(done) if stage == "prefill" else None,
        cancel=lambda: run[-1:] == [20],
    )
    answer = collect(chunks)
    assert (answer.text, answer.finish_reason, answer.stats.generated_tokens) == ("", "cancelled", 0)
    # The chunk that would have begun at 20 was not run; what was run is kept.
    assert model.generate(QUESTION, [PRICE]).stats.reused_positions == 20


@pytest.mark.parametrize("after", [1, 4])
def test_cancel_between_two_tokens(model: Model, after: int) -> None:
    chunks: list[Chunk] = []
    options = model.options(temperature=0)
    for chunk in model.stream(QUESTION, [PRICE], mode="think", options=options, cancel=lambda: len(chunks) == after):
        chunks.append(chunk)
    assert len(chunks) == after + 1
    answer = collect(chunks)
    assert (answer.text, answer.finish_reason) == ("", "cancelled")
    assert answer.thought == "$ 6 . 7 5"[: len(answer.thought)] != ""
    assert answer.stats.generated_tokens == len(chunks[-1].token_ids) == answer.stats.thought_tokens


def test_progress_goes_through_all_stages() -> None:
    model, _ = counted()
    seen: list[tuple[str, int, int]] = []
    list(model.stream(QUESTION, [PRICE, CHART], progress=lambda *stage: seen.append(stage)))
    positions = 16 + 32 + 48  # the second image brings its newline, which is one position of text
    assert seen[:3] == [("encode", 0, 2), ("encode", 1, 2), ("encode", 2, 2)]
    assert seen[3:] == [("prefill", 0, positions + 1), ("prefill", positions + 1, positions + 1)]
