"""The one training loop: fit any torch.nn.Module, log, checkpoint, and resume bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperworks.train.clipping import clipped_by_value as clipped_by_value
    from paperworks.train.distillation import Top1Distillation as Top1Distillation
    from paperworks.train.distribution import joined as joined
    from paperworks.train.dynamic_evaluation import dynamic_log_probabilities as dynamic_log_probabilities
    from paperworks.train.dynamic_evaluation import stream_log_probabilities as stream_log_probabilities
    from paperworks.train.evaluation import evaluate as evaluate
    from paperworks.train.evaluation import perplexity as perplexity
    from paperworks.train.folder import latest as latest
    from paperworks.train.interrupt import Interrupted as Interrupted
    from paperworks.train.loop import fit as fit
    from paperworks.train.losses import cross_entropy_sum as cross_entropy_sum
    from paperworks.train.losses import next_token_loss as next_token_loss
    from paperworks.train.losses import smoothed_cross_entropy_sum as smoothed_cross_entropy_sum
    from paperworks.train.optimizers import parameter_groups as parameter_groups
    from paperworks.train.paging import PagedAdamW as PagedAdamW
    from paperworks.train.paging import paged_adamw as paged_adamw
    from paperworks.train.recomputation import recompute as recompute
    from paperworks.train.report import Report as Report
    from paperworks.train.rmsprop_graves import RMSPropGraves as RMSPropGraves
    from paperworks.train.schedules import Constant as Constant
    from paperworks.train.schedules import Cosine as Cosine
    from paperworks.train.schedules import InverseSqrt as InverseSqrt
    from paperworks.train.schedules import Linear as Linear
    from paperworks.train.schedules import Schedule as Schedule
    from paperworks.train.schedules import WarmupStableDecay as WarmupStableDecay
    from paperworks.train.settings import Settings as Settings
    from paperworks.train.sharding import full_state as full_state
    from paperworks.train.step import Diverged as Diverged
    from paperworks.train.streams import Streams as Streams
    from paperworks.train.tasks import task_loss as task_loss

# Where each name lives. They are imported when asked for: the command line reads the settings without torch.
_OFFERED = {
    "Constant": "schedules",
    "Cosine": "schedules",
    "Diverged": "step",
    "Interrupted": "interrupt",
    "InverseSqrt": "schedules",
    "Linear": "schedules",
    "PagedAdamW": "paging",
    "RMSPropGraves": "rmsprop_graves",
    "Report": "report",
    "Schedule": "schedules",
    "Settings": "settings",
    "Streams": "streams",
    "Top1Distillation": "distillation",
    "WarmupStableDecay": "schedules",
    "clipped_by_value": "clipping",
    "cross_entropy_sum": "losses",
    "dynamic_log_probabilities": "dynamic_evaluation",
    "evaluate": "evaluation",
    "fit": "loop",
    "full_state": "sharding",
    "joined": "distribution",
    "latest": "folder",
    "next_token_loss": "losses",
    "paged_adamw": "paging",
    "parameter_groups": "optimizers",
    "perplexity": "evaluation",
    "recompute": "recomputation",
    "smoothed_cross_entropy_sum": "losses",
    "stream_log_probabilities": "dynamic_evaluation",
    "task_loss": "tasks",
}

__all__ = list(_OFFERED)


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OFFERED[name]}"), name)
