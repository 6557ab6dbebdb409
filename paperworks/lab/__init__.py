"""The laboratory: papers, their claims, the runner that checks them and the report of what came out.

Knows nothing about any method and imports no other room.
"""

from paperworks.lab.paper import Claim, Paper, Verdict
from paperworks.lab.results import Outcome, Result, combined_status, load_result, results_folder
from paperworks.lab.runner import run, run_claim
from paperworks.lab.workbench import Lab

__all__ = [
    "Claim",
    "Lab",
    "Outcome",
    "Paper",
    "Result",
    "Verdict",
    "combined_status",
    "load_result",
    "results_folder",
    "run",
    "run_claim",
]
