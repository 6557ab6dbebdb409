"""Specs that assemble parts into whole models, and the presets with published sizes."""

from paperworks.models.arrangement import Arrangement, NoResidual, Parallel, PostNorm, PreNorm, Sandwich
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
from paperworks.models.layer_scale import LayerScale
from paperworks.models.model import ModelSpec
from paperworks.models.presets.families import preset, presets
from paperworks.models.presets.t5 import T5Initialization
from paperworks.models.seq2seq import ConditionedDecoder, Seq2Seq, Seq2SeqModel
from paperworks.models.surgery.interpolation import interpolated, mixture_weights
from paperworks.models.surgery.upcycling import upcycle
from paperworks.models.surgery.vocabulary import with_more_tokens
from paperworks.models.tokens import TokenStack, TokenStackModel

__all__ = [
    "HME",
    "Arrangement",
    "Block",
    "ConditionedDecoder",
    "Decoder",
    "DecoderModel",
    "Encoder",
    "EncoderModel",
    "HMEModel",
    "Handwriting",
    "KneserNey",
    "LayerScale",
    "ModelSpec",
    "NoResidual",
    "Parallel",
    "PostNorm",
    "PreNorm",
    "Sandwich",
    "Seq2Seq",
    "Seq2SeqModel",
    "Stack",
    "StackModel",
    "T5Initialization",
    "TaskModel",
    "TokenStack",
    "TokenStackModel",
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
