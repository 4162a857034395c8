"""`phisight compare` on the built-in model: figures computed again from saved logits, stages, resuming, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import phisight
from phisight.cli.main import main
from phisight.compare import scoring
from phisight.compare.metrics import positions_of
from phisight.compare.passages import Asking, Question, drawn_sources
from phisight.compare.subjects import Subject
from phisight.loading import checkpoint_directory, model_directory
from phisight.sequence import ImageFeatures

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
TASKS = ["read", "chart", "ground", "count", "arithmetic", "two_images"]
PLAIN_TEXT = "The quick brown fox jumps over 13 lazy dogs. Prices rose by 4.5 % in May, said Ms. Ito. " * 60

Captured = pytest.CaptureFixture[str]
Exported = Callable[..., Path]


class Compared(NamedTuple):
    out: Path
    report: dict[str, Any]
    variants: dict[str, dict[str, Any]]


def models(exported: Exported, *decoders: str) -> list[Path]:
    checkpoint = checkpoint_directory("demo")
    return [exported(checkpoint, decoder=decoder, vision="f32" if decoder == "f32" else "int8") for decoder in decoders]


def compare(*arguments: str | Path, code: int = 0) -> None:
    assert main(["compare", *map(str, arguments), "--threads", "1"]) == code


def refused(capsys: Captured, *arguments: str | Path) -> str:
    capsys.readouterr()
    compare(*arguments, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("phisight: error: ")
    return err


def read(out: Path) -> Compared:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Compared(out, report, {each["name"]: each for each in report["variants"]})


@pytest.fixture(scope="module")
def compared(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """float32 against itself, INT8 and INT4, one question of each task. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    names = ["f32", "int8", "int4"]
    for name, made in zip(names, models(exported, *names), strict=True):
        shutil.copytree(made, folder / name)
    out = folder / "out"
    compare(folder / "f32", *(folder / name for name in names), "--out", out, "--n", "1", "--stages")
    return read(out)


def test_the_document(compared: Compared) -> None:
    report = compared.report
    assert list(report) == ["schema", "phisight", "data", "reference", "variants", "absent", "notes"]
    assert report["schema"] == 1
    assert (report["data"]["kind"], report["data"]["passages"]) == ("demo", 6)
    assert report["data"]["tasks"] == dict.fromkeys(TASKS, 1)
    assert report["reference"]["name"] == "f32"
    assert list(compared.variants) == ["f32", "int8", "int8 (accuracy_level 0)", "int4", "int4 (accuracy_level 0)"]
    for each in report["variants"]:
        assert list(each["tasks"]) == TASKS
        assert each["score"] == pytest.approx(sum(task["right"] for task in each["tasks"].values()) / 6)
        assert each["positions"] == report["data"]["positions"] > 12
        assert each["speed"] == {}
        assert len(each["worst"]) == 6
    sizes = {
        name: sum(file.stat().st_size for file in (compared.out.parent / name).iterdir()) for name in ("int4", "f32")
    }
    for name, size in sizes.items():
        manifest = (compared.out.parent / name / "phisight.json").stat().st_size
        assert compared.variants[name]["bytes"] == size - manifest
    assert compared.variants["f32"]["bpw"] == 32
    assert 4.5 < compared.variants["int4"]["bpw"] < 5.5
    levels = [(each["accuracy_level"], each["as_run"]) for each in report["variants"]]
    assert levels == [(None, True), (4, True), (0, False), (4, True), (0, False)]


def test_the_reference_against_itself(compared: Compared) -> None:
    itself = compared.variants["f32"]
    assert itself["kld"] == dict.fromkeys(itself["kld"], 0.0)
    assert (itself["same_top1"], itself["ppl_ratio"], itself["same_answers"]) == (1.0, 1.0, 1.0)
    assert itself["stages"] == dict.fromkeys(("pixels", "vision", "embeddings", "KV cache", "decoder"), 0.0)
    assert itself["tasks"] == compared.report["reference"]["tasks"]


def test_fewer_bits_cost_more(compared: Compared) -> None:
    int8, int4 = (compared.variants[f"{name} (accuracy_level 0)"] for name in ("int8", "int4"))
    assert 0 < int8["kld"]["mean"] < int4["kld"]["mean"]
    assert int8["stages"]["decoder"] < int4["stages"]["decoder"]
    assert int8["stages"]["vision"] == int4["stages"]["vision"] > 0  # the same tower
    assert int8["stages"]["embeddings"] == int4["stages"]["embeddings"] > 0
    assert int8["stages"]["pixels"] == 0
    for each in compared.variants.values():
        kld = each["kld"]
        assert kld["median"] <= kld["p99"] <= kld["p999"] <= kld["max"]


def test_figures_computed_again_from_saved_logits(compared: Compared) -> None:
    """By another way: plain Python sums, and questions asked through the public interface."""
    work, name = compared.out / "work/reference", "int4 (accuracy_level 0)"
    variant = phisight.load(compared.out.parent / "int4", threads=1, accuracy_level=0)
    by_ids = {}
    for path in work.glob("*.json"):
        record = json.loads(path.read_text())
        by_ids[tuple(record["ids"])] = (record, np.load(path.with_name(f"{path.stem}.logits.npy")))
    reference = phisight.load(compared.out.parent / "f32", threads=1)
    kld, surplus, right = [], [], 0
    for source in drawn_sources(1):
        (case,) = source
        patches = [reference.preprocess(picture) for picture in case.pictures]
        prompt = reference.prompt(case.question, len(patches))
        greedy = reference.options(temperature=0, max_tokens=96)
        answer = [token.token_id for token in reference.generate_tokens(prompt.ids, patches, greedy)]
        record, logits = by_ids[(*prompt.ids, *answer)]
        assert record["targets"][:-1] == answer
        assert len(logits) == len(answer) + 1
        assert record["targets"] == logits.argmax(axis=-1).tolist()  # greedy
        found = variant.score([*prompt.ids, *answer], patches)[-len(logits) :]
        for p_row, q_row, token in zip(logits.tolist(), found.tolist(), record["targets"], strict=True):
            p, q = softmax(p_row), softmax(q_row)
            kld.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            surplus.append(math.log(p[token] / q[token]))
            right += q.index(max(q)) == token
    said = compared.variants[name]
    assert said["positions"] == len(kld)
    assert said["kld"]["mean"] == pytest.approx(math.fsum(kld) / len(kld), rel=1e-5)
    assert said["kld"]["max"] == pytest.approx(max(kld), rel=1e-5)
    assert said["same_top1"] == right / len(kld)
    assert said["ppl_ratio"] == pytest.approx(math.exp(math.fsum(surplus) / len(kld)), rel=1e-6)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    total = math.fsum(powers)
    return [power / total for power in powers]


def test_a_stage_is_the_variants_own(compared: Compared) -> None:
    """The vision stage: the variant's image tokens in the reference's decoder, and nothing else."""
    int8, f32 = (phisight.load(compared.out.parent / name, threads=1) for name in ("int8", "f32"))
    question = Question.of(drawn_sources(1)[0])
    asked = scoring.ask(f32, question, Asking(96))
    ids, last = [*asked.prompt_ids, *asked.answer_ids], len(asked.answer_ids) + 1
    features = [ImageFeatures(b"own", int8.encode_image(patches)) for patches in asked.patches]
    swapped = positions_of(f32.score(ids, asked.patches, last=last), f32.score(ids, features, last=last), [0] * last)
    measured = [json.loads(path.read_text())["kld"] for path in (compared.out / "work/vision").glob("*.json")]
    assert swapped.kld.tolist() in measured
    np.testing.assert_array_equal(f32.score(ids, asked.patches)[-last:], f32.score(ids, asked.patches, last=last))


def test_the_page_stands_alone(compared: Compared) -> None:
    page = (compared.out / "report.html").read_text(encoding="utf-8")
    opened: list[str] = []
    pictures = 0

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            nonlocal pictures
            assert tag not in ("script", "link", "iframe", "object", "use", "image")
            for name, value in attrs:
                if name in ("src", "href", "srcset", "xlink:href"):
                    assert value is not None
                    assert value.startswith("data:image/"), value
                elif value is not None:
                    assert "//" not in value
            if tag == "img":
                pictures += 1
                assert dict(attrs)["alt"]
            if tag not in ("meta", "img", "br"):
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("rect", "line", "polyline", "circle", "ellipse", "path")

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    parser = Page()
    parser.feed(page)
    parser.close()
    assert opened == []
    assert pictures >= 6
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<figure>") == 2  # no speed was measured
    assert "prefers-color-scheme: dark" in page
    for name in compared.variants:
        assert name.replace("accuracy_level", "level") in page


def test_another_variant_costs_only_itself(
    compared: Compared, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    opened: list[str] = []
    open_ = Subject.open
    monkeypatch.setattr(Subject, "open", lambda self: opened.append(self.name) or open_(self))
    folder = compared.out.parent
    compare(folder / "f32", folder / "int8", "--out", out, "--n", "1")
    assert opened == []
    again = read(out).variants
    assert again["int8"]["kld"] == compared.variants["int8"]["kld"]
    (f16,) = models(exported, "f16")
    compare(folder / "f32", folder / "int8", f16, "--out", out, "--n", "1")
    assert opened == [f16.name]
    compare(folder / "f32", folder / "int8", "--out", out, "--n", "1", "--mode", "nothink")
    assert opened == [f16.name, "f32", "int8", "int8 (accuracy_level 0)"]  # other answers


def test_an_interrupt_keeps_what_was_measured(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    f32, int4 = models(exported, "f32", "int4")
    asked = 0
    ask = scoring.ask

    def counted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 9:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(scoring, "ask", counted)
    compare(f32, int4, "--out", tmp_path / "out", "--n", "1", code=130)
    assert "run it again to go on" in capsys.readouterr().err
    assert not (tmp_path / "out/report.json").exists()
    compare(f32, int4, "--out", tmp_path / "out", "--n", "1")
    assert asked == 9 + (6 - 2) + 6  # 6 of the reference and 2 of the variant were kept
    asked = 10
    compare(f32, int4, "--out", tmp_path / "whole", "--n", "1")
    first, whole = read(tmp_path / "out").report, read(tmp_path / "whole").report
    assert first == whole


def test_a_text(exported: Exported, tmp_path: Path, capsys: Captured) -> None:
    f32, int4 = models(exported, "f32", "int4")
    text = tmp_path / "text.txt"
    text.write_text(PLAIN_TEXT, encoding="utf-8")
    compare(f32, int4, "--out", tmp_path / "out", "--data", text, "--n", "2", "--stages", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report == read(tmp_path / "out").report
    assert (report["data"]["kind"], report["data"]["passages"], report["data"]["positions"]) == ("text", 2, 2 * 255)
    variant = report["variants"][0]
    assert (variant["tasks"], variant["score"], variant["worst"]) == ({}, None, [])
    assert variant["stages"]["vision"] == 0 < variant["stages"]["decoder"]
    model = phisight.load(f32, threads=1)
    ids = model.tokenizer.encode(PLAIN_TEXT, parse_special=False)
    total = 0.0
    for start in (0, 512):
        logits = model.score(ids[start : start + 512]).astype(np.float64)
        for at in range(256, 511):
            total += (
                np.log(np.exp(logits[at] - logits[at].max()).sum()) + logits[at].max() - logits[at, ids[start + at + 1]]
            )
    assert report["reference"]["ppl"] == pytest.approx(math.exp(total / 510), rel=1e-6)


def test_a_folder_and_a_gguf_pair(
    exported: Exported, exported_gguf: Exported, tmp_path: Path, capsys: Captured
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    ours = tmp_path / "ours"
    ours.mkdir()
    shutil.copyfile(PICTURES / "price.png", ours / "price.png")
    case = {"image": "price.png", "question": "What does the text say?", "expected": "6.75", "metric": "contains"}
    (ours / "cases.jsonl").write_text(json.dumps(case) + "\n")
    (f32,) = models(exported, "f32")
    directory = exported_gguf(checkpoint_directory("demo"), decoder="F16")
    pair = f"{directory / 'model-f16.gguf'}+{directory / 'mmproj-f16.gguf'}"
    compare(f32, pair, "--out", tmp_path / "out", "--data", ours, "--stages")
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[0] == "model-f16.gguf"
    (variant,) = read(tmp_path / "out").variants.values()
    assert (variant["format"], variant["stages"]["embeddings"]) == ("gguf", None)
    assert list(variant["tasks"]["cases"]) == ["n", "right", "contains_match", "interval"]
    assert 0 < variant["kld"]["mean"] < 0.01
    assert "model-f16.gguf cannot see" in refused(
        capsys, f32, directory / "model-f16.gguf", "--out", tmp_path / "blind", "--data", ours
    )
    (ours / "price.png").write_bytes(b"nothing")
    assert "price.png" in refused(capsys, f32, pair, "--out", tmp_path / "out", "--data", ours)


def test_other_vocabularies_are_refused(
    exported: Exported, tiny_checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = exported(tiny_checkpoint, decoder="f32")
    said = refused(capsys, "demo", other, "--out", tmp_path / "out")
    assert f"{other.name} has a vocabulary of 352 tokens, the reference demo of 832" in said
    swapped = tmp_path / "swapped"
    shutil.copytree(model_directory("demo"), swapped)
    path = swapped / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    manifest = json.loads((swapped / "phisight.json").read_text(encoding="utf-8"))
    manifest["files"]["tokenizer.json"]["bytes"] = path.stat().st_size
    (swapped / "phisight.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "is b'B' in swapped and b'A' in the reference demo" in refused(
        capsys, "demo", swapped, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_begun(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert "--n is 0" in refused(capsys, "demo", "demo", "--out", out, "--n", "0")
    assert "--data is 'none'" in refused(capsys, "demo", "demo", "--out", out, "--data", "none")
    assert "none does not exist" in refused(capsys, "demo", tmp_path / "none", "--out", out)
    assert "is no directory" in refused(capsys, "demo", "demo", "--out", out / "deeper")
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    assert "wanted 512 or more" in refused(capsys, "demo", "demo", "--out", out, "--data", short)
    short.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(capsys, "demo", "demo", "--out", out, "--data", short)
    (tmp_path / "empty").mkdir()
    assert "empty/cases.jsonl" in refused(capsys, "demo", "demo", "--out", out, "--data", tmp_path / "empty")
    assert "nothing to measure" in refused(capsys, "demo", "--out", out)
    assert "not of a comparison" in refused(capsys, "demo", "demo", "--out", tmp_path)
    assert "is a file" in refused(capsys, "demo", "demo", "--out", short)
    assert "max_patches is 5000" in refused(capsys, "demo", "demo", "--out", out, "--n", "1", "--max-patches", "5000")
