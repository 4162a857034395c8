"""The reference implementation in transformers behind the two protocols of the runtime: a row to compare with.

Its code is the publisher's (modeling_phi4_visionr.py of https://github.com/microsoft/Phi-4-reasoning-vision-15B) and
is not part of this project: the user names the folder that holds it, and by that trusts it. Pixels, prompts and greedy
choice are ours; tower, projector, embeddings, decoder and KV cache are theirs, in float32 on the CPU.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.config import ModelConfig
from phisight.errors import EngineError, InputError
from phisight.naflex import Patches

__all__ = ["CODE_FILE", "TransformersDecoder", "TransformersEncoder", "open_reference"]

CODE_FILE = "modeling_phi4_visionr.py"
MODULE = "phisight_reference_code"
TOWER = "google/siglip2-so400m-patch16-naflex"
"""The code chooses a tower by this name, where the configuration has none."""


def open_reference(code: Path, checkpoint: Path, config: ModelConfig, threads: int) -> Any:
    """The publisher's model with the checkpoint's weights. `code` is the folder of its modelling code, which is run.

    Raises InputError for a folder without it, EngineError where packages are missing or the code fails.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise EngineError(
            f'the reference implementation needs {error.name}: pip install "phisight[baselines]"'
        ) from None
    module = _module(code)
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger(MODULE).setLevel(logging.ERROR)
    try:
        settings = module.Phi4VisionR.from_pretrained(checkpoint)
        if settings.mm_vision_tower is None and config.vision is not None:
            settings.mm_vision_tower = TOWER
        if settings.pad_token_id is not None and settings.pad_token_id >= config.decoder.vocab_size:
            settings.pad_token_id = None  # Phi3Config's own default, beyond a small vocabulary
        model = module.Phi4ForCausalLMV.from_pretrained(str(checkpoint), config=settings, torch_dtype=torch.float32)
        model.float().eval()
    except Exception as error:  # code that we do not know
        raise EngineError(
            f"the reference code in {code} cannot open {checkpoint} with transformers {transformers.__version__} "
            f"({type(error).__name__}: {error}): install the versions that belong together, "
            'pip install "phisight[baselines]"'
        ) from error
    return model


def _module(code: Path) -> ModuleType:
    path = code / CODE_FILE
    if not path.is_file():
        raise InputError(
            f"{code} has no {CODE_FILE}: give the folder of the publisher's code, such as huggingface-transformers in "
            "github.com/microsoft/Phi-4-reasoning-vision-15B"
        )
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # code that we do not know
        raise EngineError(
            f"{path} cannot be run ({type(error).__name__}: {error}): install the versions that belong together, "
            'pip install "phisight[baselines]"'
        ) from error
    return module


class TransformersEncoder:
    """Tower and projector."""

    def __init__(self, model: Any, hidden_size: int) -> None:
        self._model = model
        self._hidden_size = hidden_size

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """(n, 768) -> (n, hidden_size) float32."""
        import torch

        images = {
            "pixel_values": torch.from_numpy(patches.pixel_values.copy())[None],
            "pixel_attention_mask": torch.ones((1, patches.num_patches), dtype=torch.int64),
            "spatial_shapes": torch.tensor([list(patches.grid)]),
        }
        with torch.inference_mode():
            (features,) = self._model.encode_images(images)
        rows: NDArray[np.float32] = features.float().numpy()
        return rows


class TransformersDecoder:
    """Embeddings, decoder and a cache that grows."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        from transformers import DynamicCache

        self._model = model
        self._config = config.decoder
        self._cache = DynamicCache()
        self._length = 0

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def length(self) -> int:
        return self._length

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position takes in the cache."""
        return self._config.kv_bytes_per_token(4)

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """Nothing: the cache takes memory as it grows."""

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if length < self._length:
            self._cache.crop(length)
            self._length = length

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """See `phisight.backends.base.Decoder.append`."""
        import torch

        with torch.inference_mode():
            rows = [self._embedded(torch.from_numpy(np.ascontiguousarray(piece))) for piece in pieces]
            embeds = torch.cat(rows)[None]
            positions = torch.arange(self._length, self._length + embeds.shape[1])
            found = self._model(
                inputs_embeds=embeds,
                position_ids=positions[None],
                cache_position=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if logits == "all" else 1,
            )
        self._length += embeds.shape[1]
        result: NDArray[np.float32] = found.logits[0].float().numpy()
        return result

    def _embedded(self, piece: Any) -> Any:
        return self._model.get_input_embeddings()(piece) if piece.ndim == 1 else piece
