"""The tokenizer against the reference's ids and against the `tokenizers` library, and decoding one id at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from phisight.errors import TokenizerError
from phisight.tokenizer import IncrementalDecoder, Tokenizer

FRAGMENTS = st.sampled_from([
    "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|dummy_84|>", "<|", "|>", "<", ">", "im_end", "think",
    " ", "\n", "  \n", "\t", "\x1c", "\x85", "\u3000", "\u200b", "a", "0.50", "Hello", "é", "🙂", "这",
])  # fmt: skip
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=4)), max_size=12).map("".join)


def byte_level(
    *tokens: AddedToken, vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None
) -> tokenizers.Tokenizer:
    """A byte-level tokenizer: ids 0..255 are the bytes' symbols in code point order, `tokens` come after."""
    symbols = {symbol: id_ for id_, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(models.BPE(symbols | (vocab or {}), merges or []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(list(tokens))
    return library


def token(content: str, *, lstrip: bool = False, rstrip: bool = False, special: bool = False) -> AddedToken:
    return AddedToken(content, lstrip=lstrip, rstrip=rstrip, special=special, normalized=False)


@pytest.fixture(scope="module")
def phi(golden: Path) -> Tokenizer:
    return Tokenizer.from_file(golden / "tokenizer" / "tokenizer.json")


@pytest.fixture(scope="module")
def library(golden: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(golden / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def strings(golden: Path) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = json.loads((golden / "tokenizer" / "encode_golden.json").read_text("utf-8"))
    assert len(entries) == 649
    return entries


# encoding


def test_golden_strings(phi: Tokenizer, strings: list[dict[str, object]]) -> None:
    for entry in strings:
        assert phi.encode(str(entry["text"]), parse_special=True) == entry["ids"]


def test_golden_strings_as_plain_text_come_back_whole(phi: Tokenizer, strings: list[dict[str, object]]) -> None:
    control = set(phi.control_tokens.values())
    for entry in strings:
        text = str(entry["text"])
        ids = phi.encode(text, parse_special=False)
        assert phi.decode(ids) == text
        assert control.isdisjoint(ids)
        if control.isdisjoint(entry["ids"]):  # type: ignore[arg-type]
            assert ids == entry["ids"]


def test_special_ids_of_phi(phi: Tokenizer, golden: Path) -> None:
    named = json.loads((golden / "tokenizer" / "special_tokens.json").read_text("utf-8"))
    assert phi.control_tokens == named
    assert len(phi.control_tokens) == 96
    assert phi.vocab_size == 100352
    assert (phi.id_of("<|im_end|>"), phi.id_of("<think>"), phi.id_of("</think>")) == (100265, 100350, 100351)
    assert phi.id_of("<|no such token|>") is None


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_plain_text_has_no_control_token_and_loses_nothing(phi: Tokenizer, text: str) -> None:
    ids = phi.encode(text, parse_special=False)
    assert set(phi.control_tokens.values()).isdisjoint(ids)
    assert phi.decode(ids) == text


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_split_control_agrees_with_the_library(phi: Tokenizer, library: tokenizers.Tokenizer, text: str) -> None:
    assert encode_by_stretches(phi, text) == library.encode(text, add_special_tokens=False).ids


MIXED = byte_level(
    token("<l>", lstrip=True),
    token("<r>", rstrip=True, special=True),
    token("0.5", special=False),
    token("<n>"),
    token("[END]", lstrip=True, rstrip=True, special=True),
    token("<n>>", special=True),
    token("0.50", special=False),
)


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(
        st.sampled_from(
            ["<l>", "<r>", "<n>", "<n>>", ">", "[END]", "0.5", "0", "[", " ", "\n", "\x1c", "\x85", "\u2003", "x"]
        ),
        max_size=14,
    )
)
def test_split_control_agrees_with_the_library_for_every_strip_flag(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert encode_by_stretches(Tokenizer(MIXED), text) == MIXED.encode(text, add_special_tokens=False).ids


def encode_by_stretches(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = []
    for part in tokenizer.split_control(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, parse_special=False)
    return ids


def test_ordinary_added_tokens_are_matched_in_plain_text_under_their_own_ids() -> None:
    tokenizer = Tokenizer(MIXED)
    assert list(tokenizer.control_tokens) == ["<l>", "<r>", "<n>", "[END]", "<n>>"]
    assert tokenizer.encode("0.500.5", parse_special=False) == [262, 258]
    plain = tokenizer.encode("<n>0.5[END]", parse_special=False)
    assert plain[3] == 258 and len(plain) == 3 + 1 + 5
    assert tokenizer.encode("<n>0.5 [END] ", parse_special=True) == [259, 258, 260]


def test_strip_flags_are_those_of_the_file() -> None:
    tokenizer = Tokenizer(MIXED)
    text = "a <l> b <r> c <n> d"
    assert list(tokenizer.split_control(text)) == ["a", 256, " b ", 257, "c ", 259, " d"]


def test_a_truncation_in_the_file_cuts_nothing(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("twelve bytes", parse_special=True)) == 12
    assert len(tokenizer.encode("twelve bytes", parse_special=False)) == 12


def test_merges_that_lead_to_a_control_token_are_refused() -> None:
    library = byte_level(token("ab", special=True), vocab={"ab": 256}, merges=[("a", "b")])
    tokenizer = Tokenizer(library)
    assert tokenizer.control_tokens == {"ab": 256}
    assert tokenizer.decode(tokenizer.encode("a b", parse_special=False)) == "a b"
    with pytest.raises(TokenizerError, match="becomes a control token"):
        tokenizer.encode("cab", parse_special=False)


@pytest.mark.parametrize("parse_special", [True, False])
def test_a_lone_surrogate_is_refused(phi: Tokenizer, parse_special: bool) -> None:
    with pytest.raises(TokenizerError, match=r"U\+DCE4"):
        phi.encode("M\udce4rz", parse_special=parse_special)


# decoding


def test_every_byte_has_its_token(golden: Path) -> None:
    tiny = Tokenizer.from_file(golden / "tiny_model" / "tokenizer.json")
    assert sorted(tiny.token_bytes(id_) for id_ in range(256)) == [bytes([byte]) for byte in range(256)]
    assert tiny.token_bytes(0) == b"!"  # rank 0 of cl100k
    assert tiny.token_bytes(265) == b"<|im_end|>"


def test_decode_agrees_with_the_library(phi: Tokenizer, library: tokenizers.Tokenizer) -> None:
    for id_ in [*range(0, 100256, 53), *range(100256, 100352)]:
        assert phi.decode([id_]) == library.decode([id_], skip_special_tokens=False)


def test_skip_special_leaves_out_every_control_token(phi: Tokenizer) -> None:
    ids = [100264, 13347, 100350, 0, 100351, 100265]
    assert phi.decode(ids) == "<|im_start|>Hi<think>!</think><|im_end|>"
    assert phi.decode(ids, skip_special=True) == "Hi!"


def test_an_added_token_is_its_own_text_whatever_its_characters() -> None:
    tokenizer = Tokenizer(byte_level(token("<é é>")))  # é alone is the symbol of byte E9
    assert tokenizer.decode([256]) == "<é é>"


@pytest.mark.parametrize("id_", [-200, -1, 352, 2**40])
def test_an_id_outside_the_vocabulary_is_an_error(golden: Path, id_: int) -> None:
    tiny = Tokenizer.from_file(golden / "tiny_model" / "tokenizer.json")
    with pytest.raises(TokenizerError, match=rf"token id {id_} .*vocabulary of 352"):
        tiny.token_bytes(id_)
    with pytest.raises(TokenizerError):
        IncrementalDecoder(tiny).push(id_)


def test_a_character_in_four_tokens_comes_whole(golden: Path) -> None:
    tiny = Tokenizer.from_file(golden / "tiny_model" / "tokenizer.json")
    decoder = IncrementalDecoder(tiny)
    ids = tiny.encode("a🙂b", parse_special=False)
    assert len(ids) == 6
    assert [decoder.push(id_) for id_ in ids] == ["a", "", "", "", "🙂", "b"]
    assert decoder.flush() == ""


def test_an_unfinished_character_is_not_lost(golden: Path) -> None:
    tiny = Tokenizer.from_file(golden / "tiny_model" / "tokenizer.json")
    decoder = IncrementalDecoder(tiny)
    assert [decoder.push(id_) for id_ in tiny.encode("🙂", parse_special=False)[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push(tiny.encode("x", parse_special=False)[0]) == "x"


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.one_of(st.integers(0, 255), st.integers(0, 100351)), max_size=30))
def test_pieces_join_to_the_decoding_of_the_bytes(phi: Tokenizer, ids: list[int]) -> None:
    decoder = IncrementalDecoder(phi)
    pieces = [decoder.push(id_) for id_ in ids] + [decoder.flush()]
    assert "".join(pieces) == b"".join(map(phi.token_bytes, ids)).decode("utf-8", "replace")
    assert "".join(pieces) == phi.decode(ids)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text))
def test_valid_text_never_shows_a_replacement_character(phi: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(phi)
    pieces = [decoder.push(id_) for id_ in phi.encode(text, parse_special=False)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert decoder.flush() == ""


# files that cannot be used


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json: the tokenizer cannot be read"):
        Tokenizer.from_file(tmp_path / "absent.json")
    with pytest.raises(TokenizerError, match="the tokenizer cannot be read"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not JSON",
        b"\xff\xfe\x00",
        b"[1]",
        b'{"version": "1.0"}',
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a usable tokenizer\.json") as caught:
        Tokenizer.from_file(file)
    assert "\n" not in str(caught.value)


def test_what_is_not_byte_level_bpe_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"

    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(file))
    with pytest.raises(TokenizerError, match="the model is WordLevel"):
        Tokenizer.from_file(file)

    without_decoder = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    without_decoder.save(str(file))
    with pytest.raises(TokenizerError, match="the decoder is none"):
        Tokenizer.from_file(file)

    normalizing = byte_level()
    normalizing.normalizer = normalizers.Lowercase()
    normalizing.save(str(file))
    with pytest.raises(TokenizerError, match="the normalizer is Lowercase"):
        Tokenizer.from_file(file)

    byte_level(AddedToken("<w>", single_word=True)).save(str(file))
    with pytest.raises(TokenizerError, match="<w> has single_word"):
        Tokenizer.from_file(file)
