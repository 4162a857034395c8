"""What a checkpoint is calibrated with: drawn pictures, texts, the user's own folder, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import phisight
from phisight.config import ModelConfig
from phisight.errors import ImageError, InputError
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.export.calibration.sources import read_calibration
from phisight.naflex import Patches
from phisight.tasks import TASKS
from phisight.tokenizer import Tokenizer

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
CONFIG = ModelConfig.from_checkpoint(DEMO)


def _read(source: str | Path, tokens: int = 1000) -> CalibrationData:
    return read_calibration(str(source), DEMO, CONFIG, tokens=tokens)


def _texts(data: CalibrationData) -> list[str]:
    tokenizer = Tokenizer.from_file(DEMO / "tokenizer.json")
    return [tokenizer.decode([id_ for id_ in each.ids if id_ >= 0]) for each in data.sequences]


def _cases(folder: Path, *lines: object) -> None:
    (folder / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one picture of 6 x 8 patches."""
    Image.new("RGB", (128, 96), "white").save(tmp_path / "white.png")
    return tmp_path


def test_drawn_questions_and_built_in_text() -> None:
    data = _read("demo", 2000)
    assert [source.name for source in data.sources] == [*(f"drawn {task}" for task in TASKS), "built-in text"]
    assert 2000 <= data.positions < 2400
    text = data.sources[-1]
    assert (text.pictures, text.text_tokens) == (0, 500)
    assert all(source.pictures == source.sequences for source in data.sources if source.name == "drawn read")
    thoughts = [each for each in _texts(data) if "<think>" in each]
    direct = [each for each in _texts(data) if "<|dummy_84|>" in each]
    assert thoughts
    assert direct
    assert all(each.rstrip().endswith("<|im_end|>") for each in [*thoughts, *direct])


def test_the_same_arguments_give_the_same_data() -> None:
    assert _read("demo", 700).digest == _read("demo", 700).digest
    assert _read("demo", 700).digest != _read("demo", 900).digest


def test_drawn_pictures_are_not_those_of_evaluation() -> None:
    seen = {image.digest for each in _read("demo", 3000).sequences for image in each.images}
    evaluated = set()
    for task in set(TASKS) - {"arithmetic"}:
        for seed in range(20):
            for picture in phisight.tasks.sample(task, seed).pictures:
                evaluated.add(phisight.preprocess(picture, 144, 24).digest)
    assert len(seen) > 20
    assert not seen & evaluated


def test_text_in_windows() -> None:
    data = _read("text", 1200)
    assert [len(each) for each in data.sequences] == [512, 512, 176]
    assert _texts(data)[0].startswith("The kettle on the stove")
    assert _read("text", 10**6).positions > 4000


def test_a_text_only_checkpoint_gets_text(tmp_path: Path) -> None:
    config = ModelConfig(CONFIG.decoder, None, None, CONFIG.generation)
    data = read_calibration("demo", DEMO, config, tokens=400)
    assert [source.name for source in data.sources] == ["drawn arithmetic", "built-in text"]
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    _cases(tmp_path, {"image": "a.png", "question": "What?", "expected": "x"})
    with pytest.raises(ImageError, match=r"cases\.jsonl: line 1: the checkpoint is text-only"):
        read_calibration(str(tmp_path), DEMO, config)


def test_a_mixed_folder(pictures: Path) -> None:
    _cases(
        pictures,
        {"image": "white.png", "question": "Which colour?", "expected": ["white", "White"]},
        {"question": "How much is 2 and 2?", "expected": 4},
        {"image": ["white.png", "white.png"], "question": "Where?", "expected": [0.25, 0.5, 0.75, 1]},
    )
    (pictures / "a.txt").write_text("\ufeffPlain words.", encoding="utf-8")
    (pictures / "more.jsonl").write_text('{"text": "One."}\n\n{"text": "Two."}\n')
    (pictures / "notes.md").write_text("not read")
    data = _read(pictures)
    assert [(each.name, each.sequences, each.pictures) for each in data.sources] == [
        ("cases.jsonl", 3, 3),
        ("a.txt", 1, 0),
        ("more.jsonl", 2, 0),
    ]
    assert [each.image_tokens for each in data.sequences] == [48, 0, 96, 0, 0, 0]
    texts = _texts(data)
    assert "white<|im_end|>" in texts[0]
    assert "4<|im_end|>" in texts[1]
    assert "[0.25, 0.50, 0.75, 1.00]<|im_end|>" in texts[2]
    assert texts[3:] == ["Plain words.", "One.", "Two."]
    assert len(_read(pictures, tokens=60).sequences) == 1
    assert [each.name for each in _read(pictures / "a.txt").sources] == ["a.txt"]


def test_what_a_user_types_becomes_no_control_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|im_end|><image>")
    control = Tokenizer.from_file(DEMO / "tokenizer.json").control_tokens["<|im_end|>"]
    sequence = _read(tmp_path).sequences[0]
    assert control not in sequence.ids
    assert min(sequence.ids) >= 0


def test_folders_that_cannot_be_used(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there: give demo, text, a text file or a folder"):
        _read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has neither cases\.jsonl .* nor a \.txt or \.jsonl file"):
        _read(pictures)
    (pictures / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no token"):
        _read(pictures)
    _cases(pictures, {"image": "white.png", "question": "What?"})
    with pytest.raises(InputError, match=r"cases\.jsonl: line 1: the case has no expected"):
        _read(pictures)
    (pictures / "broken.png").write_bytes((pictures / "white.png").read_bytes()[:60])
    _cases(
        pictures,
        {"image": "white.png", "question": "What?", "expected": "x"},
        {"image": "broken.png", "question": "What?", "expected": "x"},
    )
    with pytest.raises(ImageError, match=r"cases\.jsonl: line 2: .*broken\.png"):
        _read(pictures)
    _cases(pictures, {"question": "long " * 2000, "expected": "x"})
    with pytest.raises(InputError, match=r"line 1: question and pictures take \d+ positions, but the model has 1024"):
        _read(pictures)
    (pictures / "cases.jsonl").unlink()
    (pictures / "more.jsonl").write_text('{"text": "a"}\n{"words": 1}')
    with pytest.raises(InputError, match=r"more\.jsonl: line 2: there is no 'words'"):
        _read(pictures)
    (pictures / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 from byte 3"):
        _read(pictures / "latin.txt")
    with pytest.raises(InputError, match="calibration tokens are 0"):
        _read("demo", 0)


def test_which_positions_are_images() -> None:
    patches = Patches(np.zeros((6, 768), np.float32), (2, 3), (48, 32))
    sequence = CalibrationSequence("a", (5, -200, 6, 7, -200), (patches, patches))
    assert len(sequence) == 15
    assert sequence.is_image().tolist() == [False, *[True] * 6, False, False, *[True] * 6]
    assert (sequence.text_tokens, sequence.image_tokens) == (3, 12)
