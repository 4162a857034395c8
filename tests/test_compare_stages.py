"""Finer stages: joined graphs give exactly what the two they were made of give."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import phisight
from phisight.cli.main import main
from phisight.compare.stages import fine_stages
from phisight.errors import InputError
from phisight.export.mixed_graph import GraphFile, MixedModel
from phisight.loading import checkpoint_directory
from phisight.manifest import Manifest
from phisight.naflex import Patches
from phisight.sequence import ImageFeatures

DEMO = checkpoint_directory("demo")
PICTURE = Path(phisight.__file__).parent / "demo/pictures/price.png"
LAYERS = ("0", "1", "2", "3")

Exported = Callable[..., Path]


class Pair:
    """A float32 model and a variant at accuracy level 0, with one question about one picture."""

    def __init__(self, reference: Path, variant: Path, folder: Path) -> None:
        self.mixed = MixedModel(reference, variant, Manifest.read(reference).model, None, 0)
        self.reference = phisight.load(reference, threads=1)
        self.variant = phisight.load(variant, threads=1, accuracy_level=0)
        self.ids = self.reference.prompt("What does the text say?", 1).ids
        self.patches: Patches = self.reference.preprocess(PICTURE)
        self.features = ImageFeatures(b"a", self.reference.encode_image(self.patches))
        self._folder = folder
        self._number = 0

    def open(self, file: GraphFile, taken: Collection[str]) -> phisight.Model:
        self._number += 1
        out = self._folder / str(self._number)
        self.mixed.write(out, file, taken)
        return phisight.load(out, threads=1)

    def logits(self, model: phisight.Model) -> NDArray[np.float32]:
        return model.score(self.ids, [self.features])


@pytest.fixture(scope="module")
def pair(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Both with float32 embeddings and a tower of integer products, so that decoder and head alone differ."""
    reference = exported(DEMO, decoder="f32", vision="f32")
    variant = exported(DEMO, decoder="int4", head="int8", vision="w8a8")
    return Pair(reference, variant, tmp_path_factory.mktemp("mixed"))


def test_nothing_taken_is_the_reference(pair: Pair) -> None:
    np.testing.assert_array_equal(pair.logits(pair.open("decoder.onnx", ())), pair.logits(pair.reference))
    np.testing.assert_array_equal(
        pair.open("vision.onnx", ()).encode_image(pair.patches), pair.reference.encode_image(pair.patches)
    )


def test_everything_taken_is_the_variant(pair: Pair, exported: Exported) -> None:
    """The embeddings, which lie in no graph, are the reference's."""
    whole = pair.open("decoder.onnx", (*LAYERS, "head"))
    table = phisight.backends.embeddings.Embeddings(pair.mixed.reference, 256)
    rows = np.empty((40, 256), np.float32)
    table.lookup(np.arange(40, dtype=np.int32), rows)
    as_picture = [ImageFeatures(b"rows", rows)]
    np.testing.assert_array_equal(whole.score([-200], as_picture), pair.variant.score([-200], as_picture))
    np.testing.assert_array_equal(
        pair.open("vision.onnx", ("tower", "projector")).encode_image(pair.patches),
        pair.variant.encode_image(pair.patches),
    )


def test_each_stage_brings_something_and_stays_itself(pair: Pair) -> None:
    base = pair.logits(pair.reference)
    changes = [np.abs(pair.logits(pair.open("decoder.onnx", (stage,))) - base).max() for stage in (*LAYERS, "head")]
    assert all(change > 1e-4 for change in changes)
    tower, projector = (
        pair.open("vision.onnx", (stage,)).encode_image(pair.patches) for stage in ("tower", "projector")
    )
    plain, both = pair.reference.encode_image(pair.patches), pair.variant.encode_image(pair.patches)
    assert not np.array_equal(tower, plain)
    assert not np.array_equal(projector, plain)
    assert not np.array_equal(tower, both)
    # The projector alone rounds less than both together.
    assert np.abs(projector - plain).mean() < np.abs(both - plain).mean()


def test_groups_of_layers(pair: Pair) -> None:
    config = pair.mixed.config
    assert [stage.name for stage in fine_stages(config)] == [
        *("tower", "projector"),
        *(f"layer {number}" for number in range(4)),
        "head",
    ]
    deep = replace(config, vision=None, decoder=replace(config.decoder, num_layers=40))
    names = [stage.name for stage in fine_stages(deep)]
    assert names == [*(f"layers {start}-{start + 4}" for start in range(0, 40, 5)), "head"]
    taken = [number for stage in fine_stages(deep) for number in stage.taken if number != "head"]
    assert sorted(map(int, taken)) == list(range(40))


def test_graphs_that_cannot_be_joined(pair: Pair, exported: Exported, tmp_path: Path) -> None:
    half = exported(DEMO, decoder="f16", float_type="f16")
    mixed = MixedModel(pair.mixed.reference, half, pair.mixed.config, None, None)
    with pytest.raises(InputError, match="computes in other types"):
        mixed.write(tmp_path / "a", "decoder.onnx", ("0",))
    with pytest.raises(InputError, match="cannot be read as ONNX"):
        MixedModel(pair.mixed.reference, tmp_path, pair.mixed.config, None, None).write(
            tmp_path / "a", "decoder.onnx", ("0",)
        )
    assert not (tmp_path / "a").exists()


def test_fine_stages_in_the_report(exported: Exported, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    cases = [
        {"image": str(PICTURE), "question": "What does the text say?", "expected": "$6.75"},
        {"question": "How much is 3+4?", "expected": 7},
    ]
    (ours / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)), encoding="utf-8")
    f32, int4 = exported(DEMO, decoder="f32", vision="f32"), exported(DEMO, decoder="int4", vision="w8a8")
    half = exported(DEMO, decoder="f16", float_type="f16")
    out = tmp_path / "out"
    arguments = ["compare", f32, int4, half, "--out", out, "--data", ours, "--fine-stages", "--threads", "1"]
    assert main(list(map(str, arguments))) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    asked, _, other = report["variants"]
    fine = ["tower", "projector", "vision", "embeddings", "layer 0", "layer 1", "layer 2", "layer 3", "head"]
    assert list(asked["stages"]) == ["pixels", *fine, "KV cache", "decoder"]
    assert all(asked["stages"][name] > 0 for name in fine)
    assert asked["stages"]["KV cache"] == asked["stages"]["pixels"] == 0
    assert 0 < other["stages"]["tower"] < asked["stages"]["tower"]  # of floats of 16 bits
    assert other["stages"]["layer 0"] is other["stages"]["KV cache"] is None
    assert other["stages"]["decoder"] > 0
    assert not list((out / "work").glob("mixed-*"))
