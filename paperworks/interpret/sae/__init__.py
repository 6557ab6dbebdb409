"""Sparse autoencoders: dictionaries of directions in a model's activations; every kind on one buffer and one loop."""

from paperworks.interpret.sae.activations import Activations
from paperworks.interpret.sae.attention_output import (
    HeadAttribution,
    attribute_to_heads,
    head_shares,
    merged_heads,
    through_values,
)
from paperworks.interpret.sae.autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from paperworks.interpret.sae.evaluation.attributes import AdditiveAttributes, attribute_scores, best_meanings
from paperworks.interpret.sae.evaluation.autointerp import (
    ChatModel,
    Score,
    detection,
    explain,
    fuzzing,
    hold_out,
    silent_excerpts,
)
from paperworks.interpret.sae.evaluation.clamping import clamp, largest_strengths, push
from paperworks.interpret.sae.evaluation.dashboard import Excerpt, FeatureView, feature_views
from paperworks.interpret.sae.evaluation.directions import geometric_median
from paperworks.interpret.sae.evaluation.geometry import Attribution, Neighbours, ablate, attribute, neighbours, project
from paperworks.interpret.sae.evaluation.measures import Quality, Recovery, best_cosines, measure, recovery
from paperworks.interpret.sae.evaluation.planted import Families, Planted
from paperworks.interpret.sae.evaluation.stitching import (
    groups,
    insertion_effects,
    interpolate,
    nearest_cosines,
    stitch,
)
from paperworks.interpret.sae.evaluation.supervised import (
    Location,
    SupervisedDictionary,
    agreement,
    approximation,
    least_squares_codes,
    mean_codes,
    sparse_edit,
)
from paperworks.interpret.sae.evaluation.transfer import (
    decoder_cosines,
    gap_closed,
    norm_mismatch,
    random_rotation,
    rescaled,
    rotate_autoencoder,
    rotate_stream,
    transfer_table,
)
from paperworks.interpret.sae.files import load, noted_tap, save
from paperworks.interpret.sae.kinds.annealing import Annealing
from paperworks.interpret.sae.kinds.end_to_end import EndToEnd
from paperworks.interpret.sae.kinds.gated import Gated
from paperworks.interpret.sae.kinds.jumprelu import JumpReLU, jump_relu, step
from paperworks.interpret.sae.kinds.sparse import Latents
from paperworks.interpret.sae.kinds.standard import Standard
from paperworks.interpret.sae.kinds.topk import TopK, normalized_error, with_fixed_threshold
from paperworks.interpret.sae.splice import Spliced, loss_recovered, splice
from paperworks.interpret.sae.training import Resampling, Training, resample

__all__ = [
    "Activations",
    "AdditiveAttributes",
    "Annealing",
    "Attribution",
    "ChatModel",
    "EndToEnd",
    "Excerpt",
    "Families",
    "FeatureView",
    "Gated",
    "HeadAttribution",
    "JumpReLU",
    "Latents",
    "Location",
    "Neighbours",
    "Planted",
    "Quality",
    "Recovery",
    "Resampling",
    "Score",
    "SparseAutoencoder",
    "SparseAutoencoderSpec",
    "Spliced",
    "Standard",
    "SupervisedDictionary",
    "TopK",
    "Training",
    "ablate",
    "agreement",
    "approximation",
    "attribute",
    "attribute_scores",
    "attribute_to_heads",
    "best_cosines",
    "best_meanings",
    "clamp",
    "decoder_cosines",
    "detection",
    "explain",
    "feature_views",
    "fuzzing",
    "gap_closed",
    "geometric_median",
    "groups",
    "head_shares",
    "hold_out",
    "insertion_effects",
    "interpolate",
    "jump_relu",
    "largest_strengths",
    "least_squares_codes",
    "load",
    "loss_recovered",
    "mean_codes",
    "measure",
    "merged_heads",
    "nearest_cosines",
    "neighbours",
    "norm_mismatch",
    "normalized_error",
    "noted_tap",
    "project",
    "push",
    "random_rotation",
    "recovery",
    "resample",
    "rescaled",
    "rotate_autoencoder",
    "rotate_stream",
    "save",
    "silent_excerpts",
    "sparse_edit",
    "splice",
    "step",
    "stitch",
    "through_values",
    "transfer_table",
    "with_fixed_threshold",
]
