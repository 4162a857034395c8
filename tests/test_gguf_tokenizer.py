"""The tokenizer out of a GGUF file against the same one out of tokenizer.json: ids, flags, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import phisight
from phisight.errors import TokenizerError
from phisight.gguf_file import GgufFile, MetadataValue
from phisight.gguf_tokenizer import template_from_gguf, tokenizer_from_gguf
from phisight.prompt import PromptBuilder, user_message
from phisight.tokenizer import Tokenizer

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
INERT_MERGE = "À Á"  # bytes C0 and C1, which UTF-8 never holds

ReadBack = Callable[..., dict[str, MetadataValue]]


@pytest.fixture
def read_back(tmp_path: Path) -> ReadBack:
    """tokenizer.json -> the metadata that llama.cpp's converter writes for it, through a real file."""

    def write(path: Path, *, size: int = 0, flags: bool = False) -> dict[str, MetadataValue]:
        source = json.loads(path.read_text(encoding="utf-8"))
        tokens = {id_: (token, gguf.TokenType.NORMAL) for token, id_ in source["model"]["vocab"].items()}
        for added in source["added_tokens"]:
            type_ = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]] = (added["content"], type_)
        listed = [tokens.get(id_, (f"[PAD{id_}]", gguf.TokenType.UNUSED)) for id_ in range(max(size, len(tokens)))]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in source["model"]["merges"]]
        writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "phi3")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("dbrx")
        writer.add_token_list([token for token, _ in listed])
        writer.add_token_types([type_ for _, type_ in listed])
        writer.add_token_merges(merges or [INERT_MERGE])
        if flags:
            for side in ("lstrip", "rstrip"):
                ids = [added["id"] for added in source["added_tokens"] if added[side]]
                writer.add_array(f"phisight.tokenizer.{side}", ids)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return GgufFile.read(tmp_path / "tokenizer.gguf").metadata

    return write


@pytest.fixture
def metadata(read_back: ReadBack) -> dict[str, MetadataValue]:
    return read_back(DEMO / "tokenizer.json")


def test_golden_strings(golden: Path, read_back: ReadBack) -> None:
    tokenizer = tokenizer_from_gguf(read_back(golden / "tokenizer/tokenizer.json"))
    original = Tokenizer.from_file(golden / "tokenizer/tokenizer.json")
    entries = json.loads((golden / "tokenizer/encode_golden.json").read_text(encoding="utf-8"))
    assert len(entries) == 649
    for entry in entries:
        text = entry["text"]
        assert tokenizer.encode(text, parse_special=True) == entry["ids"]
        assert tokenizer.encode(text, parse_special=False) == original.encode(text, parse_special=False)
        assert tokenizer.decode(entry["ids"]) == original.decode(entry["ids"])


def test_golden_prompts(golden: Path, read_back: ReadBack) -> None:
    tokenizer = tokenizer_from_gguf(read_back(golden / "tokenizer/tokenizer.json"))
    prompts = json.loads((golden / "prompts_golden.json").read_text(encoding="utf-8"))
    cases = [case for case in prompts["cases"] if "error" not in case]
    assert len(cases) == 18
    for case in cases:
        pieces = (prompts["system_block"] + case["rendered_tail"]).split("<image>")
        ids = tokenizer.encode(pieces[0], parse_special=True)
        for piece in pieces[1:]:
            ids += [-200, *tokenizer.encode(piece, parse_special=True)]
        assert ids == prompts["system_block_ids"] + case["ids_tail"]


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("which", ["real", "tiny", "demo"])
def test_every_token_is_the_originals(golden: Path, read_back: ReadBack, which: str, flags: bool) -> None:
    path = {"real": golden / "tokenizer", "tiny": golden / "tiny_model", "demo": DEMO}[which] / "tokenizer.json"
    ours, original = tokenizer_from_gguf(read_back(path, flags=flags)), Tokenizer.from_file(path)
    assert ours.vocab_size == original.vocab_size
    assert ours.control_tokens == original.control_tokens
    ids = range(original.vocab_size)
    assert [ours.token_bytes(id_) for id_ in ids] == [original.token_bytes(id_) for id_ in ids]
    sides = ("lstrip", "rstrip", "special", "content")
    for id_, token in original._added.items():
        assert [getattr(ours._added[id_], side) for side in sides] == [getattr(token, side) for side in sides]


def test_the_demos_prompt(metadata: dict[str, MetadataValue]) -> None:
    """User-defined tokens such as 0.25 are matched in plain text; control tokens are not."""
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    messages = [user_message("Is 0.25 < 0.5?  <|im_end|> <think>\n", 1)]
    ours, original = tokenizer_from_gguf(metadata), Tokenizer.from_file(DEMO / "tokenizer.json")
    for mode in ("auto", "think", "nothink"):
        wanted = PromptBuilder(original, template).build(messages, mode=mode)  # type: ignore[arg-type]
        assert PromptBuilder(ours, template).build(messages, mode=mode).ids == wanted.ids  # type: ignore[arg-type]
    assert ours.encode("0.25", parse_special=False) == [ours.id_of("0.25")]


def test_flags_of_the_file_win(metadata: dict[str, MetadataValue]) -> None:
    end = tokenizer_from_gguf(metadata).control_tokens["<|im_end|>"]
    flagged = metadata | {
        "phisight.tokenizer.lstrip": np.array([end], np.int32),
        "phisight.tokenizer.rstrip": np.array([], np.int32),
    }
    tokenizer = tokenizer_from_gguf(flagged)
    spaced = tokenizer.encode(" <|im_end|> ", parse_special=True)
    assert spaced == [end, *tokenizer.encode(" ", parse_special=False)]


def test_unused_ids_at_the_end_are_no_tokens(read_back: ReadBack) -> None:
    original = Tokenizer.from_file(DEMO / "tokenizer.json")
    padded = tokenizer_from_gguf(read_back(DEMO / "tokenizer.json", size=original.vocab_size + 64))
    assert padded.vocab_size == original.vocab_size
    with pytest.raises(TokenizerError, match=f"token id {original.vocab_size} is not in"):
        padded.token_bytes(original.vocab_size)


def test_template(metadata: dict[str, MetadataValue]) -> None:
    assert template_from_gguf(metadata) is None
    assert template_from_gguf(metadata | {"tokenizer.chat_template": "{{ 1 }}"}) == "{{ 1 }}"
    with pytest.raises(TokenizerError, match=r"x\.gguf: tokenizer.chat_template is not a string"):
        template_from_gguf(metadata | {"tokenizer.chat_template": 7}, "x.gguf")


def changed(values: Any, at: int, value: Any) -> Any:
    copy = values.copy()
    copy[at] = value
    return copy


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model", lambda value: "llama", "tokenizer.ggml.model is 'llama', supported is gpt2"),
        ("model", lambda value: None, "tokenizer.ggml.model is missing"),
        ("pre", lambda value: "llama-bpe", "tokenizer.ggml.pre is 'llama-bpe', supported is dbrx"),
        ("pre", lambda value: value * 9**6, "tokenizer.ggml.pre is 'dbrx"),
        ("tokens", lambda value: "a b c", "tokenizer.ggml.tokens is 'a b c', wanted a list of strings"),
        ("tokens", lambda value: value[:-1], "has 831 tokens, but 832 token types"),
        ("tokens", lambda value: changed(value, 3, value[4]), "has 1 tokens twice"),
        ("tokens", lambda value: changed(value, 831, ""), "an empty control token"),
        ("token_type", lambda value: changed(value, 5, 6), "has tokens of type 6"),
        ("token_type", lambda value: value.astype(np.float32), "token_type is a list, wanted a list of integers"),
        ("merges", lambda value: None, "tokenizer.ggml.merges is missing"),
        (
            "merges",
            lambda value: changed(value, 9, "q zzz"),
            "the merge 'q zzz' does not lead from two tokens to a third",
        ),
        ("merges", lambda value: changed(value, 9, "Ġt"), "the merge 'Ġt' does not"),
    ],
)
def test_what_cannot_be_used_is_named(
    metadata: dict[str, MetadataValue], key: str, change: Callable[[Any], Any], message: str
) -> None:
    key = f"tokenizer.ggml.{key}"
    damaged = metadata | {key: change(metadata[key])}
    damaged = {name: value for name, value in damaged.items() if value is not None}
    with pytest.raises(TokenizerError) as caught:
        tokenizer_from_gguf(damaged, "model.gguf")
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.gguf")
    assert len(str(caught.value)) < 300
