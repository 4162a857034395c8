"""How far a share that was measured on some questions may be from the true one."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

Z_95 = 1.959963984540054
"""The normal distribution has 95 % of its mass within so many standard deviations."""


def wilson_interval(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of the share of right answers, (low, high) within 0 to 1; everything for no question.

    Unlike the usual estimate it holds for shares near 0 and 1 and for few questions (E. B. Wilson, JASA 22, 1927).
    """
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return (0.0 if right == 0 else low), (1.0 if right == n else high)
