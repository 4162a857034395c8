"""What came of an evaluation as lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from phisight.evaluate import EvaluationSettings, TaskReport

__all__ = ["score_header", "score_notes", "score_row"]

MEASURES = {
    "exact_match": "exact",
    "contains_match": "contains",
    "number_match": "number",
    "box_hit": "box hit",
}
NAME_WIDTH = 14
SHOWN_ERRORS = 10
"""Errors that are told; the rest is counted."""


def score_header() -> str:
    """The first line of the table."""
    return (
        f"{'task':<{NAME_WIDTH}}{'questions':>9}{'right':>9}   {'95 % interval':<17}{'constant':>8}{'tokens':>8}"
        f"{'seconds':>9}  measure"
    )


def score_row(task: str, report: TaskReport) -> str:
    """A task's line; one that was interrupted says so."""
    score = report.score
    low, high = score.interval
    right, constant = (f"{100 * share:.1f} %" for share in (score.share, report.constant.share))
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    measure = ", ".join(MEASURES[key] for key in score.shares)
    if score.mean_iou is not None:
        measure += f", mean IoU {score.mean_iou:.2f}"
    if score.n < report.planned:
        measure += f" (interrupted: {score.n} of {report.planned})"
    name = task if len(task) < NAME_WIDTH else task[: NAME_WIDTH - 4] + "..."
    return (
        f"{name:<{NAME_WIDTH}}{score.n:>9}{right:>9}   {interval:<17}{constant:>8}"
        f"{report.generated_tokens:>8}{report.seconds:>9.1f}  {measure}"
    )


def score_notes(reports: Iterable[TaskReport], settings: EvaluationSettings) -> Iterator[str]:
    """What the table does not say."""
    reports = list(reports)
    asked = sum(report.score.n for report in reports)
    thoughts = sum(report.thoughts for report in reports)
    seconds = sum(report.seconds for report in reports)
    yield f"{asked} questions in {seconds:.1f} s, mode {settings.mode}: {thoughts} answers had a thought"
    if settings.blank:
        yield "every picture was replaced by an even grey one"
    if cut := sum(report.cut for report in reports):
        limit = settings.options.max_tokens
        what = "the context" if limit is None else f"--max-tokens {limit}"
        yield f"phisight: note: {cut} answers were cut by {what}, and count as they stood"
    failed = [result for report in reports for result in report.errors]
    for result in failed[:SHOWN_ERRORS]:
        yield f"phisight: {result.case.task}, {result.case.origin} {result.case.number}: {result.error}"
    if len(failed) > SHOWN_ERRORS:
        yield f"phisight: and {len(failed) - SHOWN_ERRORS} errors more"
