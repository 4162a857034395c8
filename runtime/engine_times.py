"""Which engine answers sooner here, of those that were timed on one and the same model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from phisight.devices import DeviceChoice
from phisight.disk_cache import DiskCache
from phisight.model_cache import CacheIdentity

__all__ = ["EngineTimes", "MeasuredEngines", "kept_engines"]

POSITIONS, STEPS = 1024, 256
"""Of the question that decides: a picture with its text, and an answer with a short thought."""
MARGIN = 1.05
"""Below this ratio two engines are taken for equally fast."""


@dataclass(frozen=True)
class EngineTimes:
    """Seconds that a position of a prompt takes, and a step of decoding."""

    prefill: float
    decode: float

    @property
    def question(self) -> float:
        return POSITIONS * self.prefill + STEPS * self.decode


@dataclass(frozen=True)
class MeasuredEngines:
    """The times of both engines that read ONNX models."""

    onnxruntime: EngineTimes
    openvino: EngineTimes

    def choice(self) -> DeviceChoice:
        """OpenVINO on the CPU where it is clearly faster, else ONNX Runtime."""
        ours, other = self.onnxruntime, self.openvino
        faster = ours.question > MARGIN * other.question
        reason = (
            f"OpenVINO prefills {ours.prefill / other.prefill:.2f} and decodes {ours.decode / other.decode:.2f} times "
            f"as fast as ONNX Runtime here, {POSITIONS} positions and {STEPS} steps {other.question:.3g} s for "
            f"{ours.question:.3g} s, as phisight bench measured"
        )
        return DeviceChoice("cpu", reason, "CPU" if faster else None)

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
    return f"engines {identity.place}"
