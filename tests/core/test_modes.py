from torch import nn

from paperworks.core.modes import evaluating, training


def modes(model):
    return [module.training for module in model.modules()]


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].eval()
    before = modes(model)
    with evaluating(model):
        assert modes(model) == [False] * 3
    assert modes(model) == before
    with training(model):  # a part that was put in evaluation mode on purpose stays so
        assert modes(model) == before
    model.eval()
    with training(model):
        assert modes(model) == [True] * 3
    assert modes(model) == [False] * 3
