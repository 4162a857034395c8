"""The report of a comparison: `report.json`, of schema 1.

    {"schema": 1, "phisight": version, "data": {...}, "reference": {...}, "variants": [{...}, ...], "absent": [{...}],
     "notes": [text]}

data        kind ("demo", "folder" or "text"), source, passages (questions or windows), positions that were scored,
            max_tokens, mode, max_patches; tasks: questions of each
reference   name, path, format, bytes, bpw, bpw_all, accuracy_level, ppl, tasks, speed
            kv: the type of its KV cache
variants    the same, and for each
  name              the last component of its path, made unique; another accuracy level of it stands in brackets
  format            "onnx", "gguf", or "checkpoint" (run as ONNX in float32)
  baseline          whether another quantiser made it
  bytes             of all files that it needs; bpw: stored bits per weight of decoder, head and embeddings;
                    bpw_all: with the vision tower and projector
  accuracy_level    0 (quantised layers computed in floats: what the weights cost), 4 (activations in INT8 too), or null
  as_run            false for the other accuracy level of an ONNX model than that of its export
  positions         positions that were scored
  kld               mean, its standard error, median, p99, p999 and max, in nats, of reference || variant
  same_top1         share of positions at which both find the same token likeliest
  right_token       mean and rms of the change of the right token's probability
  ppl, ppl_ratio    perplexity on the right tokens, and over the reference's, with ppl_ratio_error, its standard error
  same_answers      share of questions to which both gave the same answer; null for a text
  tasks             {task: {"n", "right", "exact_match" | "box_hit" | ..., "mean_iou", "interval"}} as `phisight eval`
  score             share of right answers over all questions; null for a text
  stages            {stage: mean KL divergence that this stage alone brings, or null}: pixels, vision (tower and
                    projector), embeddings, KV cache (its type), decoder (layers, head and KV cache; of a GGUF model
                    with the embeddings); with --fine-stages also tower, projector, layer N or layers N-M, head: null
                    where the engine's graph cannot be cut, or the reference has no such KV cache; empty without both
  speed             load_seconds, peak_bytes (or null), and prepare_, encode_, prefill_, decode_ and
                    score_tokens_per_second: {"median", "p25", "p75", "n"} over questions or windows, or null where
                    not measured; empty without --speed
  worst             the questions with the highest mean KL divergence: passage (its number from 0), kld, same, right

absent      rows that were asked for and could not be made: name, reason, install (a command, or null)

Right tokens are those of the reference's own greedy answer and its end, or those of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

from phisight.answer import Answer, Stats
from phisight.compare.metrics import Divergence, Positions
from phisight.compare.passages import Asking, Passage, Question
from phisight.compare.run import Comparison, Measured
from phisight.compare.stages import KV_CACHE
from phisight.compare.subjects import Absent, Subject
from phisight.evaluate import Result
from phisight.evaluate.report import Score

__all__ = ["SCHEMA", "Data", "report_of"]

SCHEMA = 1
WORST = 6
"""Questions that are shown of each variant."""
STAGE_NOTE = (
    "stages: llama.cpp's graphs cannot be cut, so that the embeddings of a GGUF model are exchanged together with its "
    "decoder, and nothing finer can be told"
)
KV_NOTE = (
    "stages: the KV cache is the reference's, in the variant's type, where the reference's engine and export have it"
)
PIXELS_NOTE = "stages: pixels are exchanged together with the vision tower where a model prepares pictures otherwise"
SPEED_NOTE = (
    "speed: each model in a process of its own, after one question to warm up; peak memory is the whole process's and "
    "counts files that it has mapped as far as they were read"
)


@dataclass(frozen=True)
class Data:
    """What the passages are."""

    kind: Literal["demo", "folder", "text"]
    source: str


def report_of(comparison: Comparison, data: Data, asking: Asking, absent: Sequence[Absent] = ()) -> dict[str, Any]:
    """The document of a comparison."""
    reference, passages = comparison.reference, comparison.passages
    variants = [_variant(measured, comparison) for measured in comparison.variants]
    staged = any(measured.stages for measured in comparison.variants)
    notes = [STAGE_NOTE, KV_NOTE, PIXELS_NOTE] if staged else []
    first = comparison.variants[0].positions if comparison.variants else ()
    return {
        "schema": SCHEMA,
        "phisight": version("phisight"),
        "data": {
            "kind": data.kind,
            "source": data.source,
            "passages": len(passages),
            "positions": sum(len(answer["targets"]) for answer in comparison.answers),
            "max_tokens": None if data.kind == "text" else asking.max_tokens,
            "mode": None if data.kind == "text" else asking.mode,
            "max_patches": asking.max_patches,
            "tasks": _counts(passages),
        },
        "reference": {
            **_described(reference),
            "ppl": Divergence.of(Positions.joined(first)).ppl_reference if first else None,
            "tasks": _tasks(passages, comparison.answers),
            "score": _score(comparison.answers, passages),
            "speed": comparison.speed,
        },
        "variants": variants,
        "absent": [asdict(row) for row in absent],
        "notes": [*notes, SPEED_NOTE] if comparison.speed else notes,
    }


def _variant(measured: Measured, comparison: Comparison) -> dict[str, Any]:
    passages, answers = comparison.passages, comparison.answers
    asked = any(isinstance(passage, Question) for passage in passages)
    same = [_same(ours, theirs) for ours, theirs in zip(answers, measured.answers, strict=True)]
    return {
        **_described(measured.subject),
        **Divergence.of(Positions.joined(measured.positions)).as_json(),
        "same_answers": sum(same) / len(same) if asked else None,
        "tasks": _tasks(passages, measured.answers),
        "score": _score(measured.answers, passages),
        "stages": _stages(measured, answers),
        "speed": measured.speed,
        "worst": _worst(measured, same) if asked else [],
    }


def _described(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "path": str(subject.source.path),
        "format": subject.format,
        "baseline": subject.source.baseline,
        "accuracy_level": subject.accuracy_level,
        "as_run": subject.as_run,
        "kv": subject.kv,
        "bytes": subject.bytes,
        "bpw": subject.bpw,
        "bpw_all": subject.bpw_all,
    }


def _counts(passages: Sequence[Passage]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for passage in passages:
        if isinstance(passage, Question):
            counts[passage.case.task] = counts.get(passage.case.task, 0) + 1
    return counts


def _tasks(passages: Sequence[Passage], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score of each task, by the same judgement and under the same names as those of `phisight eval`."""
    results: dict[str, list[Result]] = {}
    for passage, record in zip(passages, records, strict=True):
        if isinstance(passage, Question):
            results.setdefault(passage.case.task, []).append(_result(passage, record))
    return {task: Score.of(found).as_json() for task, found in results.items()}


def _result(question: Question, record: dict[str, Any]) -> Result:
    answer = Answer(record["answer"], record["thought"], record["finish_reason"], Stats(**record["stats"]))
    return Result(question.case, None, answer, None, 0.0)


def _score(records: Sequence[dict[str, Any]], passages: Sequence[Passage]) -> float | None:
    right = [
        _result(passage, record).verdict.right
        for passage, record in zip(passages, records, strict=True)
        if isinstance(passage, Question)
    ]
    return sum(right) / len(right) if right else None


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return bool(ours.get("answer") == theirs.get("answer"))


def _stages(measured: Measured, answers: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    if not measured.stages:
        return {}
    pairs = zip(answers, measured.answers, strict=True)
    equal = all(ours.get("pixels") == theirs.get("pixels") for ours, theirs in pairs)
    means = {
        stage: None if positions is None else float(Positions.joined(positions).kld.mean())
        for stage, positions in measured.stages.items()
    }
    found = {"pixels": 0.0 if equal else None, **means}
    return {stage: found[stage] for stage in sorted(found, key=_place)}


def _place(stage: str) -> int:
    """Of a stage in the flow; layers keep their order."""
    known = ("pixels", "tower", "projector", "vision", "embeddings", "layer", "head", KV_CACHE, "decoder")
    return next(place for place, name in enumerate(known) if stage.startswith(name))


def _worst(measured: Measured, same: Sequence[bool]) -> list[dict[str, Any]]:
    """Different answers first, among them those with the highest mean divergence."""
    means = [float(positions.kld.mean()) for positions in measured.positions]
    order = sorted(range(len(means)), key=lambda number: (same[number], -means[number]))
    return [
        {
            "passage": number,
            "kld": means[number],
            "same": same[number],
            "answer": measured.answers[number]["answer"],
            "right": measured.answers[number]["right"],
        }
        for number in order[:WORST]
    ]
