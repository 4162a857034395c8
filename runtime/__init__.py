"""phisight: microsoft/Phi-4-reasoning-vision-15B on your own machine."""

from __future__ import annotations

__all__: list[str] = []
