"""The option --image-attention: of exports and of runs, in manifests, in `info` and in comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import phisight
from phisight.cli.main import main
from phisight.compare.subjects import Opening, Source, subjects_of
from phisight.errors import InputError
from phisight.loading import checkpoint_directory
from phisight.manifest import Manifest

Exporter = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

DEMO = checkpoint_directory("demo")
PRICE = Path(phisight.__file__).parent / "demo/pictures/price.png"
ASK = ("What does the text say?", "--image", str(PRICE), "--threads", "1")


def test_an_export_says_how_it_is_run(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "model"
    assert main(["export", "demo", str(out), "--decoder", "f32", "--image-attention", "bidirectional"]) == 0
    assert Manifest.read(out).options["image_attention"] == "bidirectional"
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    assert "\nimage attention: bidirectional\n" in capsys.readouterr().out
    assert phisight.load(out, threads=1).image_attention == "bidirectional"
    assert phisight.load(out, threads=1, image_attention="causal").image_attention == "causal"
    for mode in ("causal", "bidirectional"):
        assert main(["run", str(out), *ASK, "--image-attention", mode, "--max-tokens", "3"]) == 0


def test_a_causal_manifest_is_what_it_was_before_the_option(exported: Exporter, capsys: Capture) -> None:
    directory = exported(DEMO, decoder="f32")
    assert "image_attention" not in Manifest.read(directory).options
    assert main(["info", str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_attention"] == "causal"


def test_the_notes_tell_the_memory_of_an_image(exported: Exporter) -> None:
    directory = exported(DEMO, decoder="f32", image_attention="bidirectional")
    note = phisight.load(directory, threads=1).notes[-1]
    assert note.startswith("image attention bidirectional: an image is prefilled as one chunk") and "MiB" in note
    assert not any("attention" in note for note in phisight.load(directory, threads=1, image_attention="causal").notes)


def test_a_checkpoint_is_exported_for_what_is_asked(capsys: Capture) -> None:
    options = ["--tasks", "read", "--n", "1", "--image-attention", "bidirectional", "--threads", "1"]
    assert main(["eval", str(DEMO), *options]) == 0
    assert "read" in capsys.readouterr().out


def test_gguf_of_either_mode_is_told_apart_in_comparisons(exported_gguf: Exporter) -> None:
    """The tensors are the same, the logits are not: nothing measured of one may be taken for the other."""
    directories = [
        exported_gguf(DEMO, decoder="Q8_0"),
        exported_gguf(DEMO, decoder="Q8_0", image_attention="bidirectional"),
    ]
    manifests = [Manifest.read(directory) for directory in directories]
    assert manifests[0].tensors == manifests[1].tensors
    causal, other = (subjects_of(Source("model", path), Opening(threads=1))[0] for path in directories)
    assert causal.identity != other.identity
    assert (causal.open().image_attention, other.open().image_attention) == ("causal", "bidirectional")


def test_a_causal_export_says_what_to_do_on_the_command_line(exported: Exporter, capsys: Capture) -> None:
    directory = exported(DEMO, decoder="f32")
    assert main(["run", str(directory), *ASK, "--image-attention", "bidirectional"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("phisight: error: ") and "export it with --image-attention bidirectional" in error


def test_a_text_checkpoint_cannot_be_exported_for_it(checkpoint_copy: Path, tmp_path: Path, capsys: Capture) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config |= {"architectures": ["Phi3ForCausalLM"]}
    (checkpoint_copy / "config.json").write_text(json.dumps(config))
    weights = load_file(checkpoint_copy / "model.safetensors")
    text = {name: weight for name, weight in weights.items() if "vision" not in name and "mm_" not in name}
    save_file(text, checkpoint_copy / "model.safetensors")
    for form in ("onnx", "gguf"):
        command = ["export", str(checkpoint_copy), str(tmp_path / "out"), "--format", form]
        assert main([*command, "--image-attention", "bidirectional", "--dry-run"]) == 2
        assert "the checkpoint is text only" in capsys.readouterr().err


def test_a_causal_export_cannot_be_run_otherwise(exported: Exporter) -> None:
    with pytest.raises(InputError, match="causal image attention only: export it with --image-attention bidirectional"):
        phisight.load(exported(DEMO, decoder="f32"), image_attention="bidirectional")


def test_other_values_are_refused() -> None:
    with pytest.raises(InputError, match="image_attention is 'both', wanted one of causal, bidirectional"):
        phisight.load("demo", image_attention="both")  # type: ignore[arg-type]


def test_a_text_model_has_no_images_to_attend_to(exported_gguf: Exporter) -> None:
    file = exported_gguf(DEMO, decoder="F32", vision="F32") / "model-f32.gguf"
    with pytest.raises(InputError, match="this model takes no images"):
        phisight.load(file, image_attention="bidirectional")
