"""The whole comparison, one model open at a time.

reference: answers each question -> logits at its answer's positions, kept on disk
variant:   answers each question itself -> task scores and speed; scores the reference's answer -> KL divergence
stages:    one stage of the variant among the reference's others -> the KL divergence that it alone brings
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phisight.compare.metrics import Positions
from phisight.compare.passages import Asking, Passage, Question, Window
from phisight.compare.scoring import against, measure, refer, unchanged
from phisight.compare.speed import chosen, measure_speed
from phisight.compare.stages import KV_CACHE, FineStage, Mixer, can_be_mixed, fine_stages
from phisight.compare.subjects import Subject
from phisight.compare.swaps import features_of, with_embeddings, with_features
from phisight.compare.workspace import Record, Workspace, fingerprint
from phisight.errors import InputError, PhisightError
from phisight.model import Model

__all__ = ["Comparison", "Measured", "Progress", "compare"]


class Bar(Protocol):
    def add(self, amount: int) -> None: ...


Progress = Callable[[str, int], AbstractContextManager[Bar]]
"""Called with the name of some work and how many passages it takes; the bar counts them."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A variant. `answers` has a record for each passage; stages: positions with one stage alone taken from it, None
    where that stage cannot be taken out; empty if stages were not asked for. speed: as `measure_speed`, or empty.
    """

    subject: Subject
    positions: tuple[Positions, ...]
    answers: tuple[dict[str, Any], ...]
    stages: dict[str, tuple[Positions, ...] | None]
    speed: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything measured. The records of the reference and of each variant are in the order of the passages."""

    reference: Subject
    passages: tuple[Passage, ...]
    answers: tuple[dict[str, Any], ...]
    speed: dict[str, Any]
    variants: tuple[Measured, ...]


def compare(
    reference: Subject,
    variants: Sequence[Subject],
    passages: Sequence[Passage],
    asking: Asking,
    work: Workspace,
    progress: Progress,
    *,
    stages: bool = False,
    mixer: Mixer | None = None,
    speed: bool = False,
) -> Comparison:
    """Measure what is not in `work` yet, and put everything together.

    With a `mixer` the finer stages of ONNX variants are measured too. `speed` times each model in its own process.
    Raises PhisightError, which names the model; what was measured until then, or until an interrupt, is kept.
    """
    run = _Run(reference, passages, asking, work, progress, stages or mixer is not None, mixer)
    run.refer()
    for variant in variants:
        run.measure(variant)
    if run.stages:
        run.exchange(variants)
        run.recache(variants)
    for variant in variants if mixer is not None else ():
        run.separate(variant)
    for subject in (reference, *variants) if speed else ():
        run.time(subject)
    return Comparison(
        reference,
        tuple(passages),
        tuple(run.record("reference", reference, passage).values for passage in passages),
        run.speed(reference) if speed else {},
        tuple(run.measured(variant, speed=speed) for variant in variants),
    )


class _Run:
    def __init__(
        self,
        reference: Subject,
        passages: Sequence[Passage],
        asking: Asking,
        work: Workspace,
        progress: Progress,
        stages: bool,
        mixer: Mixer | None,
    ) -> None:
        self._reference = reference
        self._passages = passages
        self._asking = asking
        self._work = work
        self._progress = progress
        self.stages = stages
        self._mixer = mixer
        self._inseparable: set[tuple[str, str]] = set()

    def refer(self) -> None:
        """Let the reference answer."""
        subject = self._reference
        todo = [passage for passage in self._passages if not self._has("reference", subject, passage)]
        todo += [each for each in self._pictured() if each not in todo and not self._has("features", subject, each)]
        with self._opened(subject, f"reference {subject.name}", todo) as opened:
            for passage, model in opened:
                values, logits, patches = refer(model, passage, self._asking)
                self._keep("features", subject, passage, {}, features_of(model, patches) if self.stages else None)
                self._keep("reference", subject, passage, values, {"logits": logits})

    def measure(self, variant: Subject) -> None:
        """Let a variant answer, and score the reference's answers with it."""
        kinds = ["variant", "decoder"] if self.stages else ["variant"]
        todo = [each for each in self._passages if not all(self._has(kind, variant, each) for kind in kinds)]
        todo += [each for each in self._pictured() if each not in todo and not self._has("features", variant, each)]
        table = self._reference.embeddings() if self.stages and variant.embeddings() is not None else None
        with self._opened(variant, variant.name, todo) as opened:
            for passage, model in opened:
                right = self.record("reference", self._reference, passage)
                values, positions, patches = measure(model, passage, right, self._asking)
                if self.stages:
                    self._keep("features", variant, passage, {}, features_of(model, patches))
                    ids, images = with_features(right.values["ids"], self._features(self._reference, passage))
                    if table is not None:
                        ids, images = with_embeddings(ids, images, table)
                    logits = model.score(ids, images, last=len(right.values["targets"]))
                    self._keep("decoder", variant, passage, against(right, logits).as_json())
                self._keep("variant", variant, passage, {**values, "positions": positions.as_json()})

    def exchange(self, variants: Iterable[Subject]) -> None:
        """Put one stage of each variant among the reference's others."""
        pictured = set(map(id, self._pictured()))
        todo = []
        for variant in variants:
            kinds = ["vision"] if variant.embeddings() is None else ["vision", "embeddings"]
            for passage in self._passages:
                todo += [
                    (variant, kind, passage)
                    for kind in kinds
                    if (kind != "vision" or id(passage) in pictured) and not self._has(kind, variant, passage)
                ]
        with self._opened(self._reference, "stages", todo) as opened:
            for (variant, kind, passage), model in opened:
                right = self.record("reference", self._reference, passage)
                taken = variant if kind == "vision" else self._reference
                ids, images = with_features(right.values["ids"], self._features(taken, passage))
                if kind == "embeddings" and (table := variant.embeddings()) is not None:
                    ids, images = with_embeddings(ids, images, table)
                logits = model.score(ids, images, last=len(right.values["targets"]))
                self._keep(kind, variant, passage, against(right, logits).as_json())

    def recache(self, variants: Iterable[Subject]) -> None:
        """Give the reference the KV cache of each variant that has one of another type."""
        kinds = {each.kv: each for variant in variants if (each := self._reference.with_kv_of(variant)) is not None}
        for kind, subject in kinds.items():
            if kind == self._reference.kv:
                continue
            todo = [each for each in self._passages if not self._has(KV_CACHE, subject, each)]
            with self._opened(subject, f"{subject.name}: {kind} KV cache", todo) as opened:
                for passage, model in opened:
                    right = self.record("reference", self._reference, passage)
                    sequence = with_features(right.values["ids"], self._features(self._reference, passage))
                    logits = model.score(*sequence, last=len(right.values["targets"]))
                    self._keep(KV_CACHE, subject, passage, against(right, logits).as_json())

    def separate(self, variant: Subject) -> None:
        """Put each finer stage of an ONNX variant among the reference's others, in graphs joined for that."""
        assert self._mixer is not None
        if not can_be_mixed(self._reference, variant):
            return
        for stage in fine_stages(self._reference.config):
            todo = [each for each in self._seen_by(stage) if not self._has(stage.name, variant, each)]
            if not todo:
                continue
            with TemporaryDirectory(dir=self._work.folder, prefix="mixed-", ignore_cleanup_errors=True) as folder:
                mixed = Path(folder) / "model"
                try:
                    self._mixer(self._reference, variant, stage, mixed)
                except InputError:
                    self._inseparable.add((variant.identity, stage.name))
                    continue
                model = self._reference.open_at(mixed)
                with self._progress(f"{variant.name}: {stage.name}", len(todo)) as bar:
                    for passage in todo:
                        self._keep(stage.name, variant, passage, self._mixed(model, stage, passage).as_json())
                        bar.add(1)
                del model
                gc.collect()

    def _seen_by(self, stage: FineStage) -> Sequence[Passage]:
        """Passages whose probabilities can depend on a stage."""
        return self._pictured() if stage.file == "vision.onnx" else self._passages

    def _mixed(self, model: Model, stage: FineStage, passage: Passage) -> Positions:
        """Of a model with one stage exchanged."""
        right = self.record("reference", self._reference, passage)
        ids, last = right.values["ids"], len(right.values["targets"])
        if stage.file == "vision.onnx" and isinstance(passage, Question):
            patches = [model.preprocess(picture, self._asking.max_patches) for picture in passage.pictures()]
            return against(right, model.score(ids, patches, last=last))
        return against(right, model.score(*with_features(ids, self._features(self._reference, passage)), last=last))

    def time(self, subject: Subject) -> None:
        """Measure speed and memory."""
        if self._work.read("speed", self._speed_key(subject)) is not None:
            return
        passages = chosen(self._passages)
        try:
            with self._progress(f"speed of {subject.name}", len(passages)) as bar:
                found = measure_speed(subject, passages, self._asking, bar.add)
        except PhisightError as error:
            raise type(error)(f"{subject.name}: {error}") from error
        self._work.write("speed", self._speed_key(subject), found, {})

    def speed(self, subject: Subject) -> dict[str, Any]:
        """What was measured. Raises PhisightError if it went away meanwhile."""
        return self._read("speed", self._speed_key(subject)).values

    def _speed_key(self, subject: Subject) -> str:
        asked = [passage.fingerprint for passage in chosen(self._passages)]
        return fingerprint(subject.identity, subject.opening.threads, asdict(self._asking), asked)

    def measured(self, variant: Subject, *, speed: bool) -> Measured:
        """All about a variant, from its records."""
        records = [self.record("variant", variant, passage).values for passage in self._passages]
        return Measured(
            variant,
            tuple(Positions.from_json(record["positions"]) for record in records),
            tuple(records),
            self._stage_positions(variant) if self.stages else {},
            self.speed(variant) if speed else {},
        )

    def record(self, kind: str, subject: Subject, passage: Passage) -> Record:
        """What is kept. Raises PhisightError if it went away meanwhile."""
        return self._read(kind, self._key(subject, passage))

    def _read(self, kind: str, key: str) -> Record:
        found = self._work.read(kind, key)
        if found is None:
            raise PhisightError(f"{self._work.folder} changed while it was used: run the comparison again")
        return found

    def _stage_positions(self, variant: Subject) -> dict[str, tuple[Positions, ...] | None]:
        """Of each stage in the order of the flow."""
        everything, pictured = self._passages, self._pictured()
        seen: dict[str, Sequence[Passage] | None] = {
            "vision": pictured,
            "embeddings": everything if variant.embeddings() is not None else None,
            "decoder": everything,
        }
        recached = self._reference.with_kv_of(variant)
        if recached is None:
            seen[KV_CACHE] = None
        else:
            seen[KV_CACHE] = [] if recached is self._reference else everything
        if self._mixer is not None:
            mixed = can_be_mixed(self._reference, variant)
            fine = {stage.name: self._seen_by(stage) for stage in fine_stages(self._reference.config)}
            seen |= {
                name: each if mixed and (variant.identity, name) not in self._inseparable else None
                for name, each in fine.items()
            }
        return {name: None if each is None else self._positions(name, variant, each) for name, each in seen.items()}

    def _positions(self, kind: str, variant: Subject, seen: Sequence[Passage]) -> tuple[Positions, ...]:
        """Of all passages; those that the stage does not see are as they were."""
        subject = self._reference.with_kv_of(variant) if kind == KV_CACHE else variant
        among, found = set(map(id, seen)), []
        for passage in self._passages:
            if id(passage) in among and subject is not None:
                found.append(Positions.from_json(self.record(kind, subject, passage).values))
            else:
                right = self.record("variant", variant, passage).values["positions"]["reference"]
                found.append(unchanged(np.array(right, np.float64)))
        return tuple(found)

    def _pictured(self) -> list[Passage]:
        """Passages with pictures, if stages are exchanged."""
        if not self.stages:
            return []
        return [each for each in self._passages if isinstance(each, Question) and each.has_pictures]

    def _features(self, subject: Subject, passage: Passage) -> list[NDArray[np.float32]]:
        if not isinstance(passage, Question) or not passage.has_pictures:
            return []
        return list(self.record("features", subject, passage).arrays.values())

    def _key(self, subject: Subject, passage: Passage) -> str:
        asking = None if isinstance(passage, Window) else asdict(self._asking)
        return fingerprint(self._reference.identity, subject.identity, passage.fingerprint, asking)

    def _has(self, kind: str, subject: Subject, passage: Passage) -> bool:
        return self._work.read(kind, self._key(subject, passage)) is not None

    def _keep(
        self,
        kind: str,
        subject: Subject,
        passage: Passage,
        values: dict[str, Any],
        arrays: dict[str, NDArray[np.float32]] | None = None,
    ) -> None:
        if values or arrays:
            self._work.write(kind, self._key(subject, passage), values, arrays or {})

    @contextmanager
    def _opened(self, subject: Subject, name: str, todo: Sequence[Any]) -> Iterator[Iterator[tuple[Any, Model]]]:
        """Each piece of work with the open model, under a progress bar; nothing is opened if there is no work."""
        try:
            with self._progress(name, len(todo)) as bar:
                yield self._each(subject, todo, bar)
        except PhisightError as error:
            raise type(error)(f"{subject.name}: {error}") from error
        finally:
            gc.collect()  # the model, before the next one is opened

    def _each(self, subject: Subject, todo: Sequence[Any], bar: Bar) -> Iterator[tuple[Any, Model]]:
        if not todo:
            return
        model = subject.open()
        for piece in todo:
            yield piece, model
            bar.add(1)
