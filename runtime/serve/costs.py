"""What a picture will cost, told before it is sent: tokens, and seconds as far as this server has seen any."""

from __future__ import annotations

from typing import Any

from phisight.answer import Stats
from phisight.errors import InputError
from phisight.model import Model
from phisight.naflex import PATCH_SIZE, target_size
from phisight.serve.errors import api_error, refused
from phisight.serve.parameters import optional, whole

__all__ = ["Costs"]

# How much the newest answer counts in a rate.
_NEWEST = 0.3


class Costs:
    """Rates of this machine, learned from the answers."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._encode: float | None = None  # seconds per image token
        self._prefill: float | None = None  # seconds per position
        self._answer: float | None = None  # seconds per answer

    def learn(self, stats: Stats) -> None:
        """Take an answer's stage times into account."""
        if stats.images and not stats.cached_images:
            self._encode = _blend(self._encode, stats.encode_seconds / stats.image_tokens)
        if stats.prefill_positions >= PATCH_SIZE:
            self._prefill = _blend(self._prefill, stats.prefill_seconds / stats.prefill_positions)
        seconds = stats.encode_seconds + stats.prefill_seconds + stats.decode_seconds
        self._answer = _blend(self._answer, seconds)

    def retry_after(self, held: int) -> int:
        """Seconds until one of the requests held now will have ended, roughly: 1 to 60."""
        return round(min(max((self._answer or 1.0) * min(held, 2), 1), 60))

    def of_size(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a picture of `width` x `height` pixels costs, upright. Raises ApiError."""
        budget = self._model.budget
        for name, value in body.items():
            if name not in ("width", "height", "max_patches", "model") and value is not None:
                raise refused(
                    name, f"the parameter {name[:80]} is not known: give width and height", "unknown_parameter"
                )
        optional(body, "model", str, "the model's name")
        width, height = (whole(body, side, 1, 1_000_000) for side in ("width", "height"))
        if width is None or height is None:
            raise refused("width", "width or height is missing: give the picture's size in pixels", "invalid_type")
        most = whole(body, "max_patches", 1, budget.max_patches) or budget.max_patches
        try:
            seen = target_size(width, height, most, min(budget.min_patches, most))
        except InputError as error:
            raise api_error(error, "width") from None
        grid = [seen[1] // PATCH_SIZE, seen[0] // PATCH_SIZE]
        tokens = grid[0] * grid[1]
        return {
            "object": "image.cost",
            "size": [width, height],
            "seen": list(seen),
            "grid": grid,
            "tokens": tokens,
            "encode_seconds": None if self._encode is None else self._encode * tokens,
            "prefill_seconds": None if self._prefill is None else self._prefill * tokens,
        }


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST * (new - old)
