"""The largest budget of patches whose time to the first token stays below a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phisight.errors import InputError

__all__ = ["BudgetChoice", "choose_patches"]


@dataclass(frozen=True)
class BudgetChoice:
    """`patches` an image, the seconds to the first token that they take, and the target that they stay below."""

    patches: int
    seconds: float
    target: float

    def as_json(self) -> dict[str, float]:
        return {"max_patches": self.patches, "predicted_seconds": self.seconds, "target_seconds": self.target}


def choose_patches(predict: Callable[[int], float], fewest: int, most: int, target: float) -> BudgetChoice:
    """`predict` gives seconds for patches and grows with them.

    Raises InputError for a target that is no time, or that not even the fewest patches meet.
    """
    if not 0 < target < float("inf"):
        raise InputError(f"--ttft is {target:g} s, wanted a time above 0, such as 20s")
    least = predict(fewest)
    if least > target:
        raise InputError(
            f"--ttft is {target:g} s, but even {fewest} patches, the fewest of this model, are predicted to take "
            f"{least:.1f} s: allow more time, or name --max-patches"
        )
    low, high = fewest, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if predict(middle) <= target else (low, middle - 1)
    return BudgetChoice(low, predict(low), target)
