"""Specs that assemble parts into whole models, and the presets with published sizes."""

from paperworks.models.block import Block
from paperworks.models.counting import count_parameters
from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.encoder import Encoder, EncoderModel
from paperworks.models.hme import HME, HMEModel, fit_hme
from paperworks.models.presets import preset, presets
from paperworks.models.seq2seq import Seq2Seq, Seq2SeqModel
from paperworks.models.stack import Stack, StackModel
from paperworks.models.upcycling import upcycle

__all__ = [
    "HME",
    "Block",
    "Decoder",
    "DecoderModel",
    "Encoder",
    "EncoderModel",
    "HMEModel",
    "Seq2Seq",
    "Seq2SeqModel",
    "Stack",
    "StackModel",
    "count_parameters",
    "fit_hme",
    "preset",
    "presets",
    "upcycle",
]
