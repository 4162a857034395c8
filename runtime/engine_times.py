"""Which engine answers sooner here, of those that were timed on one and the same model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from phisight.devices import DeviceChoice
from phisight.disk_cache import DiskCache
from phisight.model_cache import CacheIdentity

if TYPE_CHECKING:
    from phisight.planner.verdict import Verdict

__all__ = ["POSITIONS", "STEPS", "EngineTimes", "MeasuredEngines", "kept_engines"]

POSITIONS, STEPS = 1024, 256
"""Of the question that decides: a picture with its text, and an answer with a short thought."""
MARGIN = 1.05
"""Below this ratio two engines are taken for equally fast."""


@dataclass(frozen=True)
class EngineTimes:
    """Seconds that a position of a prompt takes, a step of decoding, and opening the model."""

    prefill: float
    decode: float
    opening: float

    def seconds(self, *, once: bool) -> float:
        """Of the question that decides; `once`: with opening the model for it."""
        return POSITIONS * self.prefill + STEPS * self.decode + (self.opening if once else 0.0)


@dataclass(frozen=True)
class MeasuredEngines:
    """The times of both engines that read ONNX models."""

    onnxruntime: EngineTimes
    openvino: EngineTimes

    @property
    def both(self) -> EngineTimes:
        """OpenVINO for prompts, ONNX Runtime for steps."""
        ours, other = self.onnxruntime, self.openvino
        return EngineTimes(other.prefill, ours.decode, ours.opening + other.opening)

    def choice(self, room: Verdict, *, once: bool = False) -> DeviceChoice:
        """OpenVINO on the CPU where it is clearly faster than ONNX Runtime; both where that is clearly faster still.

        `room` tells whether both fit into memory. `once`: the model is opened for a single question.
        """
        ours, other, both = (each.seconds(once=once) for each in (self.onnxruntime, self.openvino, self.both))
        faster = ours > MARGIN * other
        paired = room.fits and min(ours, other) > MARGIN * both
        rates = self.onnxruntime.prefill / self.openvino.prefill, self.onnxruntime.decode / self.openvino.decode
        work = f"{'opening the model, ' if once else ''}{POSITIONS} positions and {STEPS} steps"
        reason = (
            f"OpenVINO prefills {rates[0]:.2f} and decodes {rates[1]:.2f} times as fast as ONNX Runtime here; {work} "
            f"take {other:.3g} s with it, {ours:.3g} s without, and {both:.3g} s with it for the positions alone, "
            f"where memory holds both ({room.reason}); as phisight bench measured"
        )
        return DeviceChoice("cpu", reason, "CPU" if paired or faster else None, paired)

    def keep(self, disk: DiskCache, identity: CacheIdentity) -> None:
        """In place of what was measured before."""
        payload = json.dumps(asdict(self)).encode()
        disk.write(_key(identity), payload, disk.least_seconds, identity.stamp, replace=True)


def kept_engines(disk: DiskCache, identity: CacheIdentity) -> MeasuredEngines | None:
    """What `keep` kept for this model, unless OpenVINO is no longer installed."""
    if find_spec("openvino") is None or (kept := disk.read(_key(identity), identity.stamp)) is None:
        return None
    values = json.loads(bytes(kept))
    return MeasuredEngines(EngineTimes(**values["onnxruntime"]), EngineTimes(**values["openvino"]))


def _key(identity: CacheIdentity) -> str:
    return f"engines, opened {identity.place}"
