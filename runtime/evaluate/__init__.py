"""How well a model answers: questions whose answers are known, drawn or the user's own, asked, judged and summed up.

cases (drawn.py, folder.py) -> answers (run.py) -> right or wrong (scoring.py) -> report (report.py, intervals.py)
"""

from __future__ import annotations

from phisight.evaluate.cases import Case, Cases
from phisight.evaluate.drawn import DrawnCases
from phisight.evaluate.failures import FailureFolder
from phisight.evaluate.folder import read_folder
from phisight.evaluate.report import TaskReport
from phisight.evaluate.run import EvaluationSettings, Result, evaluate
from phisight.evaluate.scoring import Expected

__all__ = [
    "Case",
    "Cases",
    "DrawnCases",
    "EvaluationSettings",
    "Expected",
    "FailureFolder",
    "Result",
    "TaskReport",
    "evaluate",
    "read_folder",
]
