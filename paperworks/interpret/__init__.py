"""Record and edit activations of any `torch.nn.Module`, take them apart, find circuits and directions, and steer.

Families of tools are modules of their own: `interpret.sae` (sparse autoencoders), `circuits`, `head_scores`,
`path_patching`, `circuit_overlap`, `svd_weights`, `causal_scrubbing`, `folding`, `probes`, `truth`, `ccs`,
`separation`, `defection`.
"""

from paperworks.interpret.acdc import Circuit, acdc
from paperworks.interpret.attribution_patching import attribute_edges, attribute_nodes
from paperworks.interpret.board_probes import BoardProbe, fit_board
from paperworks.interpret.contrast import add_at_end, contrast_vectors
from paperworks.interpret.edges import EdgeGraph
from paperworks.interpret.folding import centre_unembedding, centre_writes, fold_norms, fold_value_biases
from paperworks.interpret.logit_lens import LogitAttribution, direct_logit_attribution, logit_lens
from paperworks.interpret.lorra import Lorra, LorraBatch, lorra_loss
from paperworks.interpret.patching import (
    Patching,
    Site,
    aligned,
    answer_probability,
    gaussian_corruption,
    kl_divergence,
    logit_difference,
)
from paperworks.interpret.probes import Probe, lda, logistic, mass_mean, random_probe
from paperworks.interpret.prompt_view import PromptView, prompt_view
from paperworks.interpret.ranking import fit_ranking
from paperworks.interpret.representation_reading import concept_prompt, lat, scan
from paperworks.interpret.residual import Decomposition, ResidualStream, decompose, residual_stream
from paperworks.interpret.steering import (
    ControlVector,
    control_vector,
    last_token_activations,
    mean_difference,
    pca_difference,
    random_vector,
)
from paperworks.interpret.steering_damage import Damage, SteeringDamage, damage
from paperworks.interpret.taps import Recording, edit, record
from paperworks.interpret.truth import TTPD, ttpd

__all__ = [
    "TTPD",
    "BoardProbe",
    "Circuit",
    "ControlVector",
    "Damage",
    "Decomposition",
    "EdgeGraph",
    "LogitAttribution",
    "Lorra",
    "LorraBatch",
    "Patching",
    "Probe",
    "PromptView",
    "Recording",
    "ResidualStream",
    "Site",
    "SteeringDamage",
    "acdc",
    "add_at_end",
    "aligned",
    "answer_probability",
    "attribute_edges",
    "attribute_nodes",
    "centre_unembedding",
    "centre_writes",
    "concept_prompt",
    "contrast_vectors",
    "control_vector",
    "damage",
    "decompose",
    "direct_logit_attribution",
    "edit",
    "fit_board",
    "fit_ranking",
    "fold_norms",
    "fold_value_biases",
    "gaussian_corruption",
    "kl_divergence",
    "last_token_activations",
    "lat",
    "lda",
    "logistic",
    "logit_difference",
    "logit_lens",
    "lorra_loss",
    "mass_mean",
    "mean_difference",
    "pca_difference",
    "prompt_view",
    "random_probe",
    "random_vector",
    "record",
    "residual_stream",
    "scan",
    "ttpd",
]
