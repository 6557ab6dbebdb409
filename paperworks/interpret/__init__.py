"""Record and edit activations of any `torch.nn.Module`, take them apart, find circuits and directions, and steer.

Families of tools are modules of their own: `interpret.sae` (sparse autoencoders), `circuits`, `head_scores`,
`path_patching`, `circuit_overlap`, `svd_weights`, `causal_scrubbing`, `folding`, `probes`, `truth`, `ccs`,
`separation`, `defection`.
"""

from paperworks.interpret.circuits.acdc import Circuit, acdc
from paperworks.interpret.circuits.attribution_patching import attribute_edges, attribute_nodes
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import (
    Patching,
    Site,
    aligned,
    answer_probability,
    gaussian_corruption,
    kl_divergence,
    logit_difference,
)
from paperworks.interpret.lenses.logit_lens import LogitAttribution, direct_logit_attribution, logit_lens
from paperworks.interpret.lenses.prompt_view import PromptView, prompt_view
from paperworks.interpret.probing.board_probes import BoardProbe, fit_board
from paperworks.interpret.probing.probes import Probe, lda, logistic, mass_mean, random_probe
from paperworks.interpret.probing.representation_reading import concept_prompt, lat, scan
from paperworks.interpret.probing.truth import TTPD, ttpd
from paperworks.interpret.residual import Decomposition, ResidualStream, decompose, residual_stream
from paperworks.interpret.steering.lorra import Lorra, LorraBatch, lorra_loss
from paperworks.interpret.steering.vectors import (
    ControlVector,
    control_vector,
    last_token_activations,
    mean_difference,
    pca_difference,
    random_vector,
)
from paperworks.interpret.taps import Recording, edit, record
from paperworks.interpret.weights.folding import centre_unembedding, centre_writes, fold_norms, fold_value_biases

__all__ = [
    "TTPD",
    "BoardProbe",
    "Circuit",
    "ControlVector",
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
    "acdc",
    "aligned",
    "answer_probability",
    "attribute_edges",
    "attribute_nodes",
    "centre_unembedding",
    "centre_writes",
    "concept_prompt",
    "control_vector",
    "decompose",
    "direct_logit_attribution",
    "edit",
    "fit_board",
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
