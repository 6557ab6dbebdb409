"""The laboratory: papers, their claims, the runner that checks them and the report of what came out.

Knows nothing about any method and imports no other room.
"""

from paperworks.lab.checks import AtLeast, AtMost, Beats, Within
from paperworks.lab.paper import Claim, Paper, Verdict
from paperworks.lab.results import Design, Outcome, Result, load_result, results_folder
from paperworks.lab.runner import Choices, run, run_claim
from paperworks.lab.workbench import Lab

__all__ = [
    "AtLeast",
    "AtMost",
    "Beats",
    "Choices",
    "Claim",
    "Design",
    "Lab",
    "Outcome",
    "Paper",
    "Result",
    "Verdict",
    "Within",
    "load_result",
    "results_folder",
    "run",
    "run_claim",
]
