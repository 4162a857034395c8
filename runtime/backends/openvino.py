"""OpenVINO: the decoder and, where it computes it rightly, the tower of an ONNX directory.

The cache lies in the engine, place by place in the order of runs. A mask that goes with each run says which places
count, so that forgetting positions costs nothing: their places stay behind as gaps. Gaps are taken out once they are
more than what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.backends.embeddings import Embeddings
from phisight.backends.openvino_graph import variable_names, with_state
from phisight.config import DecoderConfig
from phisight.errors import EngineError, InputError
from phisight.naflex import Patches

__all__ = ["OpenVinoDecoder", "OpenVinoSettings", "OpenVinoVisionEncoder", "import_openvino"]

LEAST_GAPS = 256
"""Fewer gaps than these are left where they are."""


@dataclass(frozen=True)
class OpenVinoSettings:
    """How models are compiled. `device` is OpenVINO's name: CPU, GPU, GPU.1, NPU.

    `group` activations share a scale where they are rounded to INT8 on a CPU: as many as weights do, which is what
    accuracy level 4 means. None is no rounding, level 0. With more of them than weights OpenVINO computes in floats.
    """

    device: str = "CPU"
    threads: int = 1
    group: int | None = None

    def properties(self) -> dict[str, Any]:
        """On a CPU floats stay float32, the cache, too; other devices compute as they do by default."""
        if self.device != "CPU":
            return {}
        return {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.group or 0,
            "INFERENCE_NUM_THREADS": self.threads,
        }


def import_openvino() -> Any:
    """The openvino module. Raises EngineError that names the extra."""
    try:
        return import_module("openvino")
    except ImportError as error:
        raise EngineError(f'OpenVINO cannot be imported ({error}): pip install "phisight[openvino]"') from None


class OpenVinoVisionEncoder:
    """`vision.onnx`: patches of any grid -> image tokens."""

    def __init__(self, directory: Path, settings: OpenVinoSettings, hidden_size: int) -> None:
        """Raises EngineError if the engine is missing or cannot open the file."""
        self._hidden_size = hidden_size
        self._request = _compiled(directory / "vision.onnx", settings).create_infer_request()

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """(n, 768) -> (n, hidden_size) float32. Raises EngineError."""
        feed = {"pixel_values": patches.pixel_values, "grid": np.array(patches.grid, np.int64)}
        try:
            features: NDArray[np.float32] = self._request.infer(feed)["image_features"]
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in the vision encoder: {error}") from error
        return features


class OpenVinoDecoder:
    """`decoder.onnx` and its embeddings."""

    def __init__(self, directory: Path, settings: OpenVinoSettings, config: DecoderConfig) -> None:
        """Raises EngineError if the engine is missing or cannot open the file, InputError for a graph it cannot run."""
        self._ov = import_openvino()
        self._config = config
        self._embeddings = Embeddings(directory, config.hidden_size)
        self._compiled = _compiled(directory / "decoder.onnx", settings, state=True)
        self._request = self._compiled.create_infer_request()
        self._counts: NDArray[np.bool_] = np.zeros(0, bool)
        """Which places of the cache count."""
        self._warm_up()

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def length(self) -> int:
        return int(self._counts.sum())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position takes in a saved state; in the cache, too, on a CPU."""
        return self._config.kv_bytes_per_token(np.dtype(np.float32).itemsize)

    @property
    def bidirectional(self) -> bool:
        """The mask is ours."""
        return True

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """Nothing: the engine's cache grows by itself."""

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if length == 0:
            self._clear()
        else:
            self._counts[np.flatnonzero(self._counts)[length:]] = False

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """See `phisight.backends.base.Decoder.append`. Raises EngineError, after which nothing is cached."""
        count, length = sum(len(piece) for piece in pieces), self.length
        if len(self._counts) - length > max(LEAST_GAPS, length):
            self.state_load(self.state_save())
        embeds = np.zeros((1, count, self.hidden_size), np.float32)
        self._embeddings.fill(pieces, embeds[0])
        seen = np.ones((count, count), bool)
        allowed = np.concatenate([np.tile(self._counts, (count, 1)), np.tril(seen) if causal else seen], axis=1)
        feed = {
            "inputs_embeds": embeds,
            "num_logits": np.array([count if logits == "all" else 1], np.int64),
            "positions": np.arange(length, length + count, dtype=np.int64),
            "mask": np.where(allowed, np.float32(0), np.float32(-np.inf))[None, None],
            "beam_idx": np.zeros(1, np.int32),
        }
        try:
            rows: NDArray[np.float32] = self._request.infer(feed)["logits"][0]
            self._counts = np.concatenate([self._counts, np.ones(count, bool)])
        except RuntimeError as error:
            self._clear()  # some layers may have the new places, and others not
            raise EngineError(f"OpenVINO failed in the decoder: {error}") from error
        except BaseException:
            self._clear()
            raise
        return rows

    def cached(self, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """What is cached from position `start` on: keys and values of each layer, (kv_heads, positions, head_dim)."""
        variables, places = self._variables(), np.flatnonzero(self._counts)[start:]
        for name in self._names():
            yield variables[name].state.data[0][:, places]

    def replace(self, values: Iterable[NDArray[np.float32]]) -> None:
        """Replace what is cached by what `cached` gave, of this decoder or of ONNX Runtime's."""
        self._clear()
        variables, length = self._variables(), 0
        for name, each in zip(self._names(), values, strict=True):
            variables[name].state = self._ov.Tensor(np.ascontiguousarray(each[None]))
            length = each.shape[1]
        self._counts = np.ones(length, bool)

    def state_save(self) -> bytes:
        """What is cached: keys and values of each layer, (kv_heads, positions, head_dim) float32 each."""
        return b"".join(values.tobytes() for values in self.cached())

    def state_load(self, state: bytes | memoryview) -> None:
        """Replace what is cached by what `state_save` gave. Raises InputError for another size than whole positions."""
        length, rest = divmod(len(state), self.kv_bytes_per_token)
        if rest or not length:
            raise InputError(f"the saved state has {len(state)} bytes, not {self.kv_bytes_per_token} a position")
        config = self._config
        self.replace(np.frombuffer(state, np.float32).reshape(-1, config.num_kv_heads, length, config.head_dim))

    def fork(self) -> OpenVinoDecoder:
        """Another decoder of the same compiled model, with an empty cache."""
        twin = copy(self)
        twin._request = self._compiled.create_infer_request()
        twin._counts = np.zeros(0, bool)
        return twin

    def _warm_up(self) -> None:
        """OpenVINO arranges the weights for its kernels in the first run: let opening the model take that time."""
        self.append([np.zeros(1, np.int32)])
        self._clear()

    def _clear(self) -> None:
        self._request.reset_state()
        self._counts = np.zeros(0, bool)

    def _names(self) -> list[str]:
        return variable_names(self._config.num_layers)

    def _variables(self) -> dict[str, Any]:
        return {variable.name: variable for variable in self._request.query_state()}


def _compiled(path: Path, settings: OpenVinoSettings, *, state: bool = False) -> Any:
    ov = import_openvino()
    core = ov.Core()
    if settings.device.partition(".")[0] not in {name.partition(".")[0] for name in core.available_devices}:
        raise EngineError(
            f"OpenVINO finds no {settings.device} here, only {', '.join(core.available_devices)}: "
            "install the device's driver, or run with --device openvino for the CPU"
        )
    try:
        model = core.read_model(path)
        return core.compile_model(with_state(ov, model) if state else model, settings.device, settings.properties())
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot open {path}: {error}") from error
