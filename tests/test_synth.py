"""Synthetic checkpoints: as the real one in names, shapes and files, and safe to make."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import phisight
from phisight.cli.main import main
from phisight.config import ModelConfig
from phisight.errors import InputError
from phisight.export import synth
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import expected_tensors
from phisight.export.synth import synthesize, synthetic_model
from phisight.tokenizer import Tokenizer

FILES = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "small"
    synthesize(out, layers=3, width="tiny")
    return out


def test_it_is_a_checkpoint(small: Path) -> None:
    checkpoint = Checkpoint.open(small)
    assert checkpoint.config == synthetic_model("tiny", 3) == ModelConfig.from_checkpoint(small)
    assert checkpoint.config.vision is not None
    assert (checkpoint.config.decoder.num_layers, checkpoint.config.vision.num_layers) == (3, 4)
    assert checkpoint.tensors.keys() == expected_tensors(checkpoint.config).keys()
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config.generation.eos_token_ids == (265,)


def test_shards_and_index(small: Path) -> None:
    index = json.loads((small / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {path.name for path in small.iterdir()} == FILES | set(shards)
    total = 0
    for shard in shards:
        held = load_file(small / shard)
        assert held.keys() == {name for name, file in index["weight_map"].items() if file == shard}
        total += sum(value.nbytes for value in held.values())
        assert int.from_bytes((small / shard).read_bytes()[:8], "little") % 8 == 0
    assert index["metadata"]["total_size"] == total


def test_the_real_width(golden: Path) -> None:
    """Names and shapes of the real checkpoint at 26 layers, which gives its 27 vision layers, and 14 layers fewer."""
    wanted = json.loads((golden / "real_expected_tensors.json").read_text())
    for i in range(26, 40):
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(f"model.layers.{i}.")}
    specs = expected_tensors(synthetic_model("real", 26))
    assert {name: list(spec.shape) for name, spec in specs.items()} == wanted
    assert synthetic_model("real", 2).generation.eos_token_ids == (100265,)
    assert synthetic_model("real", 2).decoder.context_length == 32768


def test_weights_keep_activations_in_bounds(small: Path) -> None:
    for name, tensor in Checkpoint.open(small).tensors.items():
        values = tensor.load()
        assert np.isfinite(values).all()
        if values.size < 64 * 64:
            continue
        spread = 0.02 if "embed" in name else tensor.shape[-1] ** -0.5
        assert values.std() == pytest.approx(spread, rel=0.1), name
        assert abs(values.mean()) < 0.1 * spread, name
    norms = [t.load() for name, t in Checkpoint.open(small).tensors.items() if "norm" in name and "weight" in name]
    assert len(norms) == 2 * 3 + 1 + 2 * 4 + 2
    assert all(abs(norm.mean() - 1) < 0.02 for norm in norms)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """Against ml_dtypes, with exact halves of both neighbours among them."""
    bits = np.random.default_rng(0).integers(0x3000_0000, 0x4800_0000, 10000, np.uint32)
    bits[::4] = (bits[::4] & 0xFFFF_0000) | 0x8000
    values = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    np.testing.assert_array_equal(synth._bfloat16(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where values are made in other slices."""
    monkeypatch.setattr(synth, "ELEMENTS_AT_ONCE", 1000)
    done: list[int] = []
    synthesize(tmp_path / "again", layers=3, width="tiny", progress=done.append)
    assert _contents(tmp_path / "again") == _contents(small)
    assert max(done) == 1000
    assert sum(done) == sum(tensor.size for tensor in Checkpoint.open(small).tensors.values())


def test_another_seed_and_another_depth(small: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", layers=3, width="tiny", seed=1).tensors
    deeper = synthesize(tmp_path / "deeper", layers=5, width="tiny").tensors
    for name, tensor in Checkpoint.open(small).tensors.items():
        assert not np.array_equal(other[name].load(), tensor.load()), name
        np.testing.assert_array_equal(deeper[name].load(), tensor.load())


def test_the_small_tokenizer_is_the_golden_ones(golden: Path, small: Path) -> None:
    ours, theirs = (Tokenizer.from_file(path / "tokenizer.json") for path in (small, golden / "tiny_model"))
    assert ours.vocab_size == theirs.vocab_size == 352
    assert ours.control_tokens == theirs.control_tokens
    for id_ in range(352):
        assert ours.token_bytes(id_) == theirs.token_bytes(id_)
    text = "<|im_start|>user<|im_sep|>\n Grüße, 日本 it's 12345!\n\n<|im_end|> <think>x</think>"
    for parse in (True, False):
        assert ours.encode(text, parse_special=parse) == theirs.encode(text, parse_special=parse)


def test_the_real_tokenizers_special_tokens(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(synth.synthetic_tokenizer(100352)), encoding="utf-8")
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert dict(tokenizer.control_tokens) == json.loads((golden / "tokenizer/special_tokens.json").read_text())
    assert tokenizer.vocab_size == 100352
    assert tokenizer.decode(range(256, 260)) == " w256 w257 w258 w259"
    assert all(tokenizer.token_bytes(id_) for id_ in range(0, 100352, 97))
    ids = tokenizer.encode("all w256 of it", parse_special=False)
    assert max(ids) < 256
    assert tokenizer.decode(ids) == "all w256 of it"


@pytest.mark.parametrize("decoder", ["f32", "int4"])
def test_it_exports_and_runs(small: Path, exported: Callable[..., Path], decoder: Literal["f32", "int4"]) -> None:
    model = phisight.load(exported(small, decoder=decoder), threads=2)
    features = model.encode_image(model.preprocess(Image.new("RGB", (40, 40), "red")))
    assert 0.05 < features.std() < 20
    logits = model.score(model.tokenizer.encode("What is this?", parse_special=False))
    assert 0.3 < logits.std() < 3  # neither flat nor all on one token
    answer = model.generate("What?", [Image.new("RGB", (40, 40))], options=model.options(seed=0, max_tokens=4))
    assert answer.stats.generated_tokens <= 4


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"architectures": ["Phi4ForCausalLMV"]}')
    with pytest.raises(InputError, match="exists: choose another name"):
        synthesize(mine, layers=1, width="tiny")
    with pytest.raises(InputError, match="neither a synthetic checkpoint nor empty"):
        synthesize(mine, layers=1, width="tiny", force=True)
    (mine / "config.json").write_text("not JSON")
    with pytest.raises(InputError, match="neither a synthetic checkpoint nor empty"):
        synthesize(mine, layers=1, width="tiny", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "config.json"]


def test_force_replaces_a_synthetic_checkpoint_and_an_empty_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    synthesize(out, layers=1, width="tiny", force=True)
    assert synthesize(out, layers=2, width="tiny", force=True).config.decoder.num_layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(small, old)

    def interrupt(weights: int) -> None:
        assert any(".partial" in path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    for out in (tmp_path / "new", old):
        with pytest.raises(KeyboardInterrupt):
            synthesize(out, layers=1, width="tiny", force=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert _contents(old) == _contents(small)


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    # One layer at the real width: about 1.44 thousand million weights of 2 bytes, and a little slack.
    with pytest.raises(InputError, match=r"needs 2\.9\d GB, but .* has 1\.00 GB free"):
        synthesize(tmp_path / "out", layers=1, width="real")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"layers": 0}, "layers is 0"), ({"seed": -1}, "seed is -1"), ({"width": "huge"}, "width is 'huge'")],
)
def test_arguments_that_cannot_be(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthesize(tmp_path / "out", **({"layers": 1, "width": "tiny"} | arguments))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["synth", str(out), "--layers", "1", "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tensors = Checkpoint.open(out).tensors
    assert report["weights"] == sum(tensor.size for tensor in tensors.values())
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert set(report["files"]) == {path.name for path in out.iterdir()}
    assert main(["synth", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["synth", str(out), "--layers", "2", "--force"]) == 0
    assert "weights" in capsys.readouterr().out
    assert main(["synth", str(tmp_path / "none"), "--layers", "0"]) == 2
    assert "layers is 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_names_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ml_dtypes'] = None; from phisight.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "synth", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'needs the package ml_dtypes: pip install "phisight[export]"' in done.stderr
    assert list(tmp_path.iterdir()) == []
