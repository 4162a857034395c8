"""`phisight ground` on the built-in model: what it says, what it draws, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import phisight
from phisight.cli import ground as command
from phisight.cli.album import OUTLINE
from phisight.cli.main import main

BUTTONS = str(Path(phisight.__file__).parent / "demo/pictures/buttons.png")
SAVE = "click the Save button"

Captured = pytest.CaptureFixture[str]


def document(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["ground", "demo", *arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_box_and_click_point_are_told_for_people_and_as_json(capsys: Captured) -> None:
    found = document(capsys, BUTTONS, SAVE)
    assert main(["ground", "demo", BUTTONS, SAVE]) == 0
    out, err = capsys.readouterr()
    left, top, right, bottom = found["pixels"]
    assert out == (
        f"box    {left}, {top} to {right}, {bottom} of 128 x 128 pixels\n"
        f"click  {found['point'][0]}, {found['point'][1]}\n"
    )
    assert err == ""
    assert found["box"] == json.loads(found["text"])
    assert left == round(found["box"][0] * 128) and found["drawn"] is None
    assert found["finish_reason"] == "stop" and found["stats"]["images"] == 1


def test_the_box_is_drawn_on_the_upright_picture(tmp_path: Path, capsys: Captured) -> None:
    with Image.open(BUTTONS) as image:
        upright = image.convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, exif=exif)
    out = tmp_path / "found.png"
    found = document(capsys, str(stored), SAVE, "--draw", str(out))
    assert found["pixels"] == document(capsys, BUTTONS, SAVE)["pixels"]
    with Image.open(out) as image:
        drawn = np.asarray(image)
    marked = np.argwhere((drawn == OUTLINE).all(axis=-1))
    left, top, right, bottom = found["pixels"]
    assert [*marked.min(axis=0), *marked.max(axis=0)] == pytest.approx([top, left, bottom, right], abs=1)
    elsewhere = np.ones(drawn.shape[:2], dtype=bool)
    elsewhere[tuple(marked.T)] = False
    assert (drawn[elsewhere] == np.asarray(upright)[elsewhere]).all()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_outline_grows_with_the_picture(tmp_path: Path, capsys: Captured) -> None:
    with Image.open(BUTTONS) as image:
        image.resize((128 * 8, 128 * 8), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    out = tmp_path / "found.png"
    arguments = (str(tmp_path / "large.png"), SAVE, "--max-patches", "64", "--draw", str(out))
    left, top, *_ = document(capsys, *arguments)["pixels"]
    with Image.open(out) as image:
        row = np.asarray(image)[top + 40]
    assert (row == OUTLINE).all(axis=-1)[left : left + 20].sum() == 128 * 8 // command.OUTLINE_SHARE


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((BUTTONS, " "), 2, "the instruction is empty"),
        (("nowhere.png", SAVE), 2, "nowhere.png does not exist"),
        ((BUTTONS, SAVE, "--draw", "found.jpg"), 2, "found.jpg does not end in .png"),
        ((BUTTONS, SAVE, "--draw", "nowhere/found.png"), 2, "nowhere is no directory"),
        ((BUTTONS, SAVE, "--draw", BUTTONS), 2, "exists: choose another name"),
        ((BUTTONS, SAVE, "--max-tokens", "3"), 1, "cut by the limit of tokens"),
        ((BUTTONS, SAVE, "--max-patches", "0"), 2, "max_patches is 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[str, ...], code: int, message: str, capsys: Captured, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ground", "demo", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("phisight: error: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_note_tells_what_was_not_enforced(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phisight.grounding.is_installed", lambda: False)
    assert main(["ground", "demo", BUTTONS, SAVE]) == 0
    assert "phisight: note: llguidance is not installed" in capsys.readouterr().err
