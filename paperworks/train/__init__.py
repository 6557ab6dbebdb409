"""The one training loop: fit any torch.nn.Module, log, checkpoint, and resume bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperworks.train.distillation import Top1Distillation as Top1Distillation
    from paperworks.train.distributed.distribution import joined as joined
    from paperworks.train.distributed.sharding import full_state as full_state
    from paperworks.train.dynamic_evaluation import dynamic_log_probabilities as dynamic_log_probabilities
    from paperworks.train.dynamic_evaluation import stream_log_probabilities as stream_log_probabilities
    from paperworks.train.evaluation import evaluate as evaluate
    from paperworks.train.evaluation import perplexity as perplexity
    from paperworks.train.loop import fit as fit
    from paperworks.train.losses import cross_entropy_sum as cross_entropy_sum
    from paperworks.train.losses import next_token_loss as next_token_loss
    from paperworks.train.losses import smoothed_cross_entropy_sum as smoothed_cross_entropy_sum
    from paperworks.train.optim.clipping import clipped_by_value as clipped_by_value
    from paperworks.train.optim.optimizers import parameter_groups as parameter_groups
    from paperworks.train.optim.paging import PagedAdamW as PagedAdamW
    from paperworks.train.optim.paging import paged_adamw as paged_adamw
    from paperworks.train.optim.rmsprop_graves import RMSPropGraves as RMSPropGraves
    from paperworks.train.optim.schedules import Constant as Constant
    from paperworks.train.optim.schedules import Cosine as Cosine
    from paperworks.train.optim.schedules import InverseSqrt as InverseSqrt
    from paperworks.train.optim.schedules import Linear as Linear
    from paperworks.train.optim.schedules import Schedule as Schedule
    from paperworks.train.optim.schedules import WarmupStableDecay as WarmupStableDecay
    from paperworks.train.recomputation import recompute as recompute
    from paperworks.train.runs.folder import latest as latest
    from paperworks.train.runs.interrupt import Interrupted as Interrupted
    from paperworks.train.runs.report import Report as Report
    from paperworks.train.settings import Settings as Settings
    from paperworks.train.step import Diverged as Diverged
    from paperworks.train.streams import Streams as Streams
    from paperworks.train.tasks import task_loss as task_loss

# Where each name lives. They are imported when asked for: the command line reads the settings without torch.
_OFFERED = {
    "Constant": "optim.schedules",
    "Cosine": "optim.schedules",
    "Diverged": "step",
    "Interrupted": "runs.interrupt",
    "InverseSqrt": "optim.schedules",
    "Linear": "optim.schedules",
    "PagedAdamW": "optim.paging",
    "RMSPropGraves": "optim.rmsprop_graves",
    "Report": "runs.report",
    "Schedule": "optim.schedules",
    "Settings": "settings",
    "Streams": "streams",
    "Top1Distillation": "distillation",
    "WarmupStableDecay": "optim.schedules",
    "clipped_by_value": "optim.clipping",
    "cross_entropy_sum": "losses",
    "dynamic_log_probabilities": "dynamic_evaluation",
    "evaluate": "evaluation",
    "fit": "loop",
    "full_state": "distributed.sharding",
    "joined": "distributed.distribution",
    "latest": "runs.folder",
    "next_token_loss": "losses",
    "paged_adamw": "optim.paging",
    "parameter_groups": "optim.optimizers",
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
