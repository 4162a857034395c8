"""`phisight imatrix`, and its file in `phisight export`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import phisight
from phisight.cli.main import main
from phisight.config import ModelConfig
from phisight.export.calibration.data import CalibrationSequence
from phisight.export.calibration.run import Calibration, Consumer, LayerInputs
from phisight.export.calibration.sources import read_calibration
from phisight.export.names import HEAD, expected_tensors, gguf_name
from phisight.export.parallel import Progress
from phisight.export.quantized import QuantizedWeights
from phisight.manifest import Manifest
from phisight.quant.blocks import Blocks
from phisight.quant.imatrix import ImportanceMatrix
from phisight.quant.packing import unpack_matmul_nbits, unpack_q4_0, unpack_q8_0
from phisight.quant.scheme import BlockScheme

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"
QUICK = ("--calibration-tokens", "400", "--calibration-threads", "1")


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("phisight: error: ")
    return error


def test_a_matrix_and_an_export_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra [gguf], is not installed")
    out = tmp_path / "demo.imatrix.gguf"
    assert main(["imatrix", "demo", str(out), *QUICK, "--image-token-weight", "0.5", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "built-in text" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    matrix = ImportanceMatrix.read(out)
    assert report["weights"] == len(matrix.weights) == 17
    assert report["sha256"] == matrix.digest
    totals = report["calibration"]
    assert totals["image_token_weight"] == 0.5
    assert totals["image_tokens"] > 100
    counted = totals["text_tokens"] + totals["image_tokens"] / 2
    assert abs(matrix.weights["output.weight"].counts[0] - counted) <= 0.5

    model = tmp_path / "model"
    arguments = ["export", "demo", str(model), "--format", "gguf", "--decoder", "q4_k_m", "--onnx-vision", "none"]
    assert main([*arguments, "--imatrix", str(out)]) == 0
    assert Manifest.read(model).options["imatrix"] == matrix.digest
    capsys.readouterr()
    assert "no use for q4_0" in _fails(
        capsys, "export", "demo", str(tmp_path / "x"), "--format", "gguf", "--imatrix", str(out)
    )
    assert "--imatrix does not go with --format onnx" in _fails(
        capsys, "export", "demo", str(tmp_path / "x"), "--imatrix", str(out)
    )


def test_an_interrupted_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["imatrix", "demo", str(tmp_path / "whole.gguf"), *QUICK]) == 0
    out = tmp_path / "out.gguf"
    run = Calibration.run

    def interrupted(self: Calibration, consumer: Consumer, progress: Progress) -> None:
        def stop(layer: LayerInputs) -> None:
            if layer.index == 2:
                raise KeyboardInterrupt
            consumer(layer)

        run(self, stop, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "run", interrupted)
        assert main(["imatrix", "demo", str(out), *QUICK]) == 130
    assert "phisight: interrupted" in capsys.readouterr().err
    assert not out.exists()
    assert "another checkpoint, other data" in _fails(
        capsys, "imatrix", "demo", str(out), "--calibration-tokens", "300"
    )
    assert main(["imatrix", "demo", str(out), *QUICK]) == 0
    assert "going on from there" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()


def test_what_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert "is not a directory" in _fails(capsys, "imatrix", "demo", str(tmp_path / "no/out.gguf"))
    assert "is not there" in _fails(capsys, "imatrix", "demo", str(out), "--calibration", str(tmp_path / "no"))
    assert "image_token_weight is -1" in _fails(capsys, "imatrix", "demo", str(out), "--image-token-weight", "-1")
    out.write_text("a letter")
    assert "exists" in _fails(capsys, "imatrix", "demo", str(out))
    assert "no importance matrix" in _fails(capsys, "imatrix", "demo", str(out), "--force")
    assert out.read_text() == "a letter"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize(
    ("method", "decoder"), [("search", "int8"), ("awq", "int4"), ("gptq", "int4"), ("awq+gptq", "int4")]
)
def test_an_export_by_a_method(
    method: str,
    decoder: str,
    exported: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nearer to the float32 model than plain rounding, in a directory that is like any other."""
    arguments = ["--decoder", decoder, "--accuracy-level", "0", "--vision", "f32"]
    plain, chosen = tmp_path / "plain", tmp_path / "chosen"
    assert main(["export", "demo", str(plain), *arguments]) == 0
    quick = ("--calibration-tokens", "3000", "--calibration-threads", "1", "--image-token-weight", "0.5")
    assert main(["export", "demo", str(chosen), *arguments, "--method", method, *quick]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen", "plain"]
    manifest = Manifest.read(chosen)
    manifest.verify(chosen)
    assert manifest.options["method"] == method
    assert manifest.calibration is not None
    assert manifest.calibration["image_token_weight"] == 0.5
    assert manifest.calibration["parts"] == ["decoder", "head"]  # and nothing of the tower
    assert len(manifest.calibration["sources"]) == 7
    assert Manifest.read(plain).calibration is None
    assert manifest.tensors == Manifest.read(plain).tensors

    reference = phisight.load(exported(DEMO, decoder="f32"), threads=1)
    used, more = (_drawn(tokens, manifest.model) for tokens in (3000, 6000))
    fresh = more[len(used) :]
    assert len(fresh) > 10
    before, after = (_divergence(reference, phisight.load(each, threads=1), fresh) for each in (plain, chosen))
    assert after < 0.9 * before


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_an_export_stopped_while_it_quantises_ends_the_same(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped with half a weight of the second layer written, behind two that are complete."""
    arguments = ["--decoder", "int4", "--vision", "f32", "--method", method, *QUICK]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["export", "demo", str(whole), *arguments]) == 0
    keep = QuantizedWeights.keep

    def interrupted(
        self: QuantizedWeights, name: str, shape: tuple[int, ...], scheme: BlockScheme, parts: Iterable[Blocks]
    ) -> None:
        def first(parts: Iterable[Blocks]) -> Iterator[Blocks]:
            yield replace(next(iter(parts)), scale=np.zeros((1, 1), np.float16))
            raise KeyboardInterrupt

        keep(self, name, shape, scheme, first(parts) if name == "model.layers.1.mlp.gate_up_proj.weight" else parts)

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeights, "keep", interrupted)
        assert main(["export", "demo", str(out), *arguments]) == 130
    assert not out.exists()
    capsys.readouterr()
    assert main(["export", "demo", str(out), *arguments]) == 0
    assert "going on from there" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(("method", "bits"), [("awq", 8), ("gptq", 8), ("gptq", 4)])
def test_both_formats_hold_the_same_numbers(
    method: str, bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", method, *QUICK]
    onnx_out, gguf_out = str(tmp_path / "onnx"), str(tmp_path / "gguf")
    assert main(["export", "demo", onnx_out, "--decoder", f"int{bits}", *arguments]) == 0
    assert main(["export", "demo", gguf_out, "--format", "gguf", "--decoder", f"q{bits}_0", *arguments]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf", "onnx"]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"gguf/model-q{bits}_0.gguf").tensors}
    graph = onnx.load(tmp_path / "onnx/decoder.onnx")
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.graph.initializer}
    unpack = unpack_q4_0 if bits == 4 else unpack_q8_0
    for name in expected_tensors(Manifest.read(tmp_path / "onnx").model):
        if name == HEAD and bits == 4:  # INT8 in ONNX, Q6_K in GGUF
            assert stored[gguf_name(name)].tensor_type == gguf.GGMLQuantizationType.Q6_K
        elif (packed := weights.get(f"{name}.packed")) is not None:
            blocks = unpack(stored[gguf_name(name)].data)
            np.testing.assert_array_equal(blocks.q, unpack_matmul_nbits(packed, bits))
            np.testing.assert_array_equal(blocks.scale, weights[f"{name}.scales"])
        elif name in weights:
            np.testing.assert_array_equal(stored[gguf_name(name)].data, weights[name])
    assert Manifest.read(tmp_path / "gguf").options["method"] == method
    assert Manifest.read(tmp_path / "gguf").calibration == Manifest.read(tmp_path / "onnx").calibration


def test_options_of_calibration_without_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--method", "rtn"]):
        arguments = ("export", "demo", str(tmp_path / "x"), *options, "--calibration", "demo")
        assert "--calibration goes with --method search, awq, gptq or awq+gptq" in _fails(capsys, *arguments)
    arguments = ("export", "demo", str(tmp_path / "x"), "--format", "gguf", "--decoder", "q4_k_m", "--method", "gptq")
    assert "q4_k_m does not go by the method gptq" in _fails(capsys, *arguments)
    assert main(["export", "demo", str(tmp_path / "x"), "--decoder", "f32", "--method", "gptq"]) == 0
    assert "has no effect" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _drawn(tokens: int, config: ModelConfig) -> list[CalibrationSequence]:
    data = read_calibration("demo", DEMO, config, tokens=tokens)
    return [each for each in data.sequences if each.source.startswith("drawn")]


def _divergence(reference: phisight.Model, model: phisight.Model, sequences: list[CalibrationSequence]) -> float:
    """The mean Kullback-Leibler divergence of the next token's distribution from the reference's."""
    total, count = 0.0, 0
    for sequence in sequences:
        wanted, found = (_log_shares(each.score(sequence.ids, sequence.images)) for each in (reference, model))
        total += float((np.exp(wanted) * (wanted - found)).sum())
        count += len(sequence)
    return total / count


def _log_shares(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shares: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shares
