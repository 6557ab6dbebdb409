"""Specs that assemble parts into models, and the named presets."""

from paperworks.models.block import Block
from paperworks.models.counting import count_parameters
from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.presets import preset, presets

__all__ = ["Block", "Decoder", "DecoderModel", "count_parameters", "preset", "presets"]
