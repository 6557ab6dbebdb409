"""Circuits: patching, attribution, search for the edges that matter."""

from paperworks.interpret.circuits.circuits import (
    Factored,
    attention_of,
    composition,
    composition_scores,
    copying_score,
    direct_path,
    full_ov,
    full_qk,
    ov_circuit,
    path_expansion,
    qk_circuit,
    skip_trigrams,
)

__all__ = [
    "Factored",
    "attention_of",
    "composition",
    "composition_scores",
    "copying_score",
    "direct_path",
    "full_ov",
    "full_qk",
    "ov_circuit",
    "path_expansion",
    "qk_circuit",
    "skip_trigrams",
]
