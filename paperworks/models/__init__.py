"""Specs that assemble parts into whole models, and the presets with published sizes."""

from paperworks.models.backbone import Stack, StackModel
from paperworks.models.block import Block
from paperworks.models.classic.handwriting import Handwriting
from paperworks.models.classic.hierarchical_mixture import HME, HMEModel, fit_hme
from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.models.classic.word_vector_files import read_word_vectors, write_word_vectors
from paperworks.models.classic.word_vectors import WordVectors
from paperworks.models.counting import count_parameters
from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.encoder import Encoder, EncoderModel
from paperworks.models.heads import TaskModel
from paperworks.models.presets.families import preset, presets
from paperworks.models.seq2seq import Seq2Seq, Seq2SeqModel
from paperworks.models.surgery.interpolation import interpolated, mixture_weights
from paperworks.models.surgery.upcycling import upcycle
from paperworks.models.surgery.vocabulary import with_more_tokens

__all__ = [
    "HME",
    "Block",
    "Decoder",
    "DecoderModel",
    "Encoder",
    "EncoderModel",
    "HMEModel",
    "Handwriting",
    "KneserNey",
    "Seq2Seq",
    "Seq2SeqModel",
    "Stack",
    "StackModel",
    "TaskModel",
    "WordVectors",
    "count_parameters",
    "fit_hme",
    "interpolated",
    "mixture_weights",
    "preset",
    "presets",
    "read_word_vectors",
    "upcycle",
    "with_more_tokens",
    "write_word_vectors",
]
