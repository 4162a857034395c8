"""`--max-patches auto`: what a time to the first token allows, what is said of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import phisight
from phisight.cli.main import main
from phisight.disk_cache import DiskCache
from phisight.errors import InputError
from phisight.loading import model_directory
from phisight.model_cache import CacheIdentity
from phisight.planner.opened import OpenedRates, budget_of, measure_opened, rates_of

PICTURE = str(model_directory("demo").parent / "pictures/price.png")
ASK = ["run", "demo", "What does the text say?", "--image", PICTURE, "--temperature", "0", "--no-cache", "--json"]


def test_enough_time_allows_every_patch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, "--max-patches", "auto", "--ttft", "10min"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["text"] == "$6.75"
    assert document["budget"]["max_patches"] == phisight.load("demo").budget.max_patches
    assert 0 < document["budget"]["predicted_seconds"] < document["budget"]["target_seconds"] == 600
    assert f"{document['budget']['max_patches']} patches per image" in said.err


def test_without_auto_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASK) == 0
    assert "budget" not in json.loads(capsys.readouterr().out)


def test_less_time_means_fewer_patches() -> None:
    model = phisight.load("demo", threads=1)
    rates = measure_opened(model)
    assert min(rates.prefill, rates.encode) > 0 <= rates.tower_attention
    fewest, most = model.budget.min_patches, model.budget.max_patches
    slow = OpenedRates(1e-9, 1e-8, 0.0)
    all_of_them = budget_of(model, slow, text=50, images=1, target=1e6)
    less = budget_of(model, slow, text=50, images=1, target=0.7 * all_of_them.seconds)
    two = budget_of(model, slow, text=50, images=2, target=all_of_them.seconds)
    assert all_of_them.patches == most > less.patches > two.patches >= fewest
    with pytest.raises(InputError, match=f"even {fewest} patches"):
        budget_of(model, slow, text=50, images=1, target=1e-9)


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = phisight.load("demo", threads=1)
    disk = DiskCache(tmp_path)
    one, other = CacheIdentity("one", "made of"), CacheIdentity("other", "made of")
    first = rates_of(model, disk, one, 1)
    monkeypatch.setattr("phisight.planner.opened.measure_opened", lambda model: OpenedRates(1.0, 2.0, 3.0))
    assert rates_of(model, disk, one, 1) == first
    new = OpenedRates(1.0, 2.0, 3.0)
    assert rates_of(model, disk, other, 1) == rates_of(model, disk, one, 2) == rates_of(model, None, one, 1) == new


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-patches", "some"], "neither a whole number nor auto"),
        (["--max-patches", "64", "--ttft", "20s"], "--max-patches is 64"),
        (["--max-patches", "auto", "--ttft", "soon"], "--ttft is 'soon'"),
        (["--ttft", "0.000001"], "even"),
    ],
)
def test_bad_budgets_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_batch_takes_no_speed_of_the_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"prompt": "?"}\n')
    assert main(["batch", "demo", str(cases), "--out", str(tmp_path / "out.jsonl"), "--ttft", "20s"]) == 2
    assert "phisight plan" in capsys.readouterr().err
