"""Decoding: sampling, beam search, text; the same code for every mixer."""

from paperworks.generation.any_order import Filled, conditionals, fill
from paperworks.generation.beam import beam_search
from paperworks.generation.decoding import decode
from paperworks.generation.sampling import Sampling, penalize_repetition
from paperworks.generation.text import generate

__all__ = [
    "Filled",
    "Sampling",
    "beam_search",
    "conditionals",
    "decode",
    "fill",
    "generate",
    "penalize_repetition",
]
