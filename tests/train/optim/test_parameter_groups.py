import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.train.optim.parameter_groups import build_optimizer, parameter_groups, trainable, undecayed
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


def settings(weight_decay: float, *groups: train.Group) -> train.Settings:
    return train.Settings(lr=0.01, optimizer=train.AdamW(weight_decay=weight_decay), groups=groups)


def decayed_names(model: nn.Module, *own: train.Group) -> set[str]:
    groups = parameter_groups(model, settings(0.1, *own))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_only_maps_are_decayed() -> None:
    expected = {"embed.weight", "linear.weight", "matrix", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert decayed_names(Everything()) == expected


def test_embeddings_are_left_alone_where_a_group_says_so() -> None:
    assert "embed.weight" not in decayed_names(Everything(), train.Group("embed.weight", weight_decay=0.0))


def test_frozen_parameters_are_in_no_group_and_every_other_is_in_one() -> None:
    model = Everything()
    groups = parameter_groups(model, settings(0.1))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_tied_parameter_is_optimized_once() -> None:
    model = Language(tied=True)
    groups = parameter_groups(model, settings(0.1))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == 3  # the shared table, the gain and the bias of the norm


def test_without_decay_there_is_one_group() -> None:
    assert len(parameter_groups(classifier(), settings(0.0))) == 1


def test_a_model_that_is_frozen_altogether_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the model's 4 parameters has requires_grad"):
        trainable(classifier().requires_grad_(False))


def test_what_is_not_an_optimizer_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"<lambda> returned list for the parameter groups; a torch\.optim\.Optimizer is needed"
    ):
        build_optimizer(classifier(), train.Settings(optimizer=lambda groups: groups))  # type: ignore[arg-type, return-value]


def test_an_optimizer_of_foreign_tensors_is_refused() -> None:
    stranger = nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"no parameters of the model \(the first has shape \(7,\)\)"):
        build_optimizer(classifier(), train.Settings(optimizer=lambda groups: torch.optim.SGD([stranger], lr=1.0)))


def rates_and_decays(model: nn.Module, *own: train.Group, weight_decay: float = 0.1) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, settings(weight_decay, *own))
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_by_pattern_set_rate_and_decay_and_the_last_one_that_sets_a_field_wins() -> None:
    found = rates_and_decays(
        classifier(),
        train.Group("0.*", lr_factor=0.1),
        train.Group("*.bias", weight_decay=0.3),
        train.Group("{0,3}.bias", lr_factor=2.0),
    )
    assert found == {"0.weight": (0.001, 0.1), "0.bias": (0.02, 0.3), "3.weight": (0.01, 0.1), "3.bias": (0.02, 0.3)}


def test_a_group_reaches_a_tied_parameter_under_each_of_its_names() -> None:
    model = Language(tied=True)
    for pattern in ("embed.weight", "out.weight"):
        assert rates_and_decays(model, train.Group(pattern, lr_factor=0.5))["embed.weight"] == (0.005, 0.1)


def test_a_named_set_is_the_parameters_of_its_linear_layers() -> None:
    found = rates_and_decays(classifier(), train.Group("all-linear", lr_factor=0.5))
    assert {lr for lr, _ in found.values()} == {0.005}


def test_a_pattern_that_matches_nothing_lists_near_misses() -> None:
    with pytest.raises(ValueError, match=r"pattern 'embd\.weight' matches no parameter of Language.*embed\.weight"):
        parameter_groups(Language(), settings(0.1, train.Group("embd.weight", weight_decay=0.0)))


def test_a_pattern_that_matches_only_frozen_parameters_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Group\('frozen\.\*'\) matches 2 parameters, such as frozen\.weight, but none"
    ):
        parameter_groups(Everything(), settings(0.1, train.Group("frozen.*", lr_factor=0.5)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "sets nothing: give lr_factor or weight_decay"),
        ({"lr_factor": 0.0}, r"Group\.lr_factor is 0\.0; it must be above 0"),
        ({"weight_decay": -1.0}, r"Group\.weight_decay is -1\.0; it must be 0 or more"),
    ],
)
def test_a_group_with_a_wrong_field_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.Group("*", **fields)


class Foreign(nn.Module):
    """A model that excludes parameters from weight decay in the ways of mamba_ssm and timm."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.ones(2, 2))
        self.rates._no_weight_decay = True  # type: ignore[attr-defined]
        self.pos_embed = nn.Parameter(torch.ones(2, 2))
        self.inner = nn.Module()
        self.inner.scale = nn.Parameter(torch.ones(2, 2))
        self.inner.map = nn.Parameter(torch.ones(2, 2))
        self.inner._no_weight_decay_params = ["scale"]  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def test_parameters_that_a_foreign_module_excludes_are_not_decayed() -> None:
    model = Foreign()
    assert undecayed(model) == {id(model.rates), id(model.pos_embed), id(model.inner.scale)}
    assert decayed_names(model) == {"inner.map"}


def test_groups_for_a_function_leave_the_decay_to_its_own_default() -> None:
    optimizer = build_optimizer(classifier(), train.Settings(optimizer=torch.optim.AdamW))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]  # torch's default, and none
