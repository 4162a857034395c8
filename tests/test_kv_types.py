"""What the KV cache takes by engine and type, and a type that an engine does not have."""

from __future__ import annotations

import json

import pytest

import phisight
from phisight.backends.ort import OrtDecoder
from phisight.cli.main import main
from phisight.errors import InputError


def test_info_tells_what_a_token_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["kv_bytes_per_token"]
    decoder = phisight.load("demo", threads=1)._decoder._decoder
    assert isinstance(decoder, OrtDecoder)
    assert told == {"f32": decoder.kv_bytes_per_token}
    assert main(["info", "demo"]) == 0
    assert f"KV cache: {told['f32'] / 1024:g} KiB as f32 a token" in capsys.readouterr().out


def test_onnx_refuses_int8_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="kv_type q8_0 needs scales measured"):
        phisight.load("demo", kv_type="q8_0")
    assert main(["run", "demo", "hello", "--kv", "int8"]) == 2
    assert "needs scales" in capsys.readouterr().err
