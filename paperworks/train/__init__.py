"""One training loop: fit any torch.nn.Module, log, checkpoint, and resume bit for bit."""

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
    from paperworks.train.learning_rate import RateSweep as RateSweep
    from paperworks.train.learning_rate import find_lr as find_lr
    from paperworks.train.loop import fit as fit
    from paperworks.train.losses import cross_entropy_sum as cross_entropy_sum
    from paperworks.train.losses import next_token_loss as next_token_loss
    from paperworks.train.losses import smoothed_cross_entropy_sum as smoothed_cross_entropy_sum
    from paperworks.train.optim.adam import Adam as Adam
    from paperworks.train.optim.adamw import AdamW as AdamW
    from paperworks.train.optim.clipping import ClipByValue as ClipByValue
    from paperworks.train.optim.groups import Group as Group
    from paperworks.train.optim.lion import Lion as Lion
    from paperworks.train.optim.optimizer import OptimizerSpec as OptimizerSpec
    from paperworks.train.optim.paged_adamw import PagedAdamW as PagedAdamW
    from paperworks.train.optim.parameter_groups import parameter_groups as parameter_groups
    from paperworks.train.optim.rmsprop import RMSprop as RMSprop
    from paperworks.train.optim.rmsprop_graves import RMSPropGraves as RMSPropGraves
    from paperworks.train.optim.schedules import Constant as Constant
    from paperworks.train.optim.schedules import Cosine as Cosine
    from paperworks.train.optim.schedules import InverseSqrt as InverseSqrt
    from paperworks.train.optim.schedules import Linear as Linear
    from paperworks.train.optim.schedules import Schedule as Schedule
    from paperworks.train.optim.schedules import WarmupStableDecay as WarmupStableDecay
    from paperworks.train.optim.sgd import SGD as SGD
    from paperworks.train.optim.update_rule import UpdateRule as UpdateRule
    from paperworks.train.recomputation import recompute as recompute
    from paperworks.train.runs.folder import latest as latest
    from paperworks.train.runs.interrupt import Interrupted as Interrupted
    from paperworks.train.runs.report import Report as Report
    from paperworks.train.settings import Settings as Settings
    from paperworks.train.step_log import Diverged as Diverged
    from paperworks.train.streams import Streams as Streams
    from paperworks.train.tasks import task_loss as task_loss

# Module of each name, imported when the name is first used: the command line reads the settings without torch.
_OFFERED = {
    "Adam": "optim.adam",
    "AdamW": "optim.adamw",
    "ClipByValue": "optim.clipping",
    "Constant": "optim.schedules",
    "Cosine": "optim.schedules",
    "Diverged": "step_log",
    "Group": "optim.groups",
    "Interrupted": "runs.interrupt",
    "InverseSqrt": "optim.schedules",
    "Linear": "optim.schedules",
    "Lion": "optim.lion",
    "OptimizerSpec": "optim.optimizer",
    "PagedAdamW": "optim.paged_adamw",
    "RMSPropGraves": "optim.rmsprop_graves",
    "RMSprop": "optim.rmsprop",
    "RateSweep": "learning_rate",
    "Report": "runs.report",
    "SGD": "optim.sgd",
    "Schedule": "optim.schedules",
    "Settings": "settings",
    "Streams": "streams",
    "Top1Distillation": "distillation",
    "UpdateRule": "optim.update_rule",
    "WarmupStableDecay": "optim.schedules",
    "cross_entropy_sum": "losses",
    "dynamic_log_probabilities": "dynamic_evaluation",
    "evaluate": "evaluation",
    "find_lr": "learning_rate",
    "fit": "loop",
    "full_state": "distributed.sharding",
    "joined": "distributed.distribution",
    "latest": "runs.folder",
    "next_token_loss": "losses",
    "parameter_groups": "optim.parameter_groups",
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
