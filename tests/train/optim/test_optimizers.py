import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.train.optim import optimizers
from tests.train.small import Language, classifier


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((3, 4))  # its gain is a matrix, and still a gain
        self.batch_norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def decayed_names(model: nn.Module, **settings: object) -> set[str]:
    groups = train.parameter_groups(model, train.Settings(weight_decay=0.1, **settings))  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_only_maps_are_decayed() -> None:
    expected = {"embed.weight", "linear.weight", "matrix", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert decayed_names(Everything()) == expected


def test_embeddings_are_left_alone_when_asked_to() -> None:
    assert "embed.weight" not in decayed_names(Everything(), decay_embeddings=False)


def test_frozen_parameters_are_in_no_group_and_every_other_is_in_one() -> None:
    model = Everything()
    groups = train.parameter_groups(model, train.Settings())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_tied_parameter_is_optimized_once() -> None:
    model = Language(tied=True)
    groups = train.parameter_groups(model, train.Settings())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == 3  # the shared table, the gain and the bias of the norm


def test_without_decay_there_is_one_group() -> None:
    assert len(train.parameter_groups(classifier(), train.Settings(weight_decay=0.0))) == 1


def test_a_model_that_is_frozen_altogether_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the model's 4 parameters has requires_grad"):
        optimizers.trainable(classifier().requires_grad_(False))


def test_what_is_not_an_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"returned list; a torch\.optim\.Optimizer is needed"):
        optimizers.make(classifier(), train.Settings(), lambda groups: groups)  # type: ignore[arg-type, return-value]


def test_an_optimizer_of_foreign_tensors_is_refused() -> None:
    stranger = nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"no parameters of the model \(the first has shape \(7,\)\)"):
        optimizers.make(classifier(), train.Settings(), lambda groups: torch.optim.SGD([stranger], lr=1.0))
