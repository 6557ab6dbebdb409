import math

import pytest
import torch
from torch import Tensor, nn

from paperworks import train

from .small import Language, classifier, examples, mean_loss, summed_loss


def test_a_counted_loss_is_averaged_over_elements_not_over_batches() -> None:
    model = classifier().double().eval()
    batches = [(x.double(), y) for x, y in examples(2, size=3) + examples(1, size=9)]
    whole = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    expected = mean_loss(model, whole).item()
    assert train.evaluate(model, summed_loss, batches)["loss"] == pytest.approx(expected, rel=1e-13)  # float64


def test_a_scalar_loss_is_averaged_over_batches() -> None:
    model, batches = classifier().double(), [(x.double(), y) for x, y in examples(3)]
    expected = sum(mean_loss(model, batch).item() for batch in batches) / 3
    assert train.evaluate(model, mean_loss, batches)["loss"] == pytest.approx(expected, rel=1e-13)


def test_metrics_are_means_over_the_same_elements_or_pairs_of_their_own() -> None:
    def loss(model: nn.Module, batch: tuple[float, int]) -> tuple:
        value, count = batch
        return torch.tensor(value * count), count, {"mean": torch.tensor(value), "own": (torch.tensor(value), 1)}

    measured = train.evaluate(classifier(), loss, [(1.0, 1), (4.0, 3)])
    assert measured == {"loss": 13 / 4, "mean": 13 / 4, "own": 5 / 2}


def test_every_module_is_evaluated_in_evaluation_mode_and_put_back() -> None:
    model = classifier(dropout=0.5)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(any(module.training for module in model.modules()))
        return mean_loss(model, batch)

    train.evaluate(model, loss, examples(1))
    assert seen == [False]
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        train.evaluate(model, lambda model, batch: 1 / 0, examples(1))
    assert [module.training for module in model.modules()] == modes


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        train.evaluate(classifier(), mean_loss, [])
    with pytest.raises(ValueError, match="counted 0 elements"):
        train.evaluate(classifier(), lambda model, batch: (torch.tensor(0.0), 0), examples(1))


@pytest.mark.parametrize(("context", "stride"), [(64, None), (5, None), (5, 1), (5, 4), (7, 3), (2, 1)])
def test_perplexity_scores_each_token_once_where_it_is_first_reached(context: int, stride: int | None) -> None:
    model = Language().double()
    tokens = torch.randint(0, 11, (23,), generator=torch.Generator().manual_seed(0))
    step = stride or context - 1
    with torch.no_grad():
        total = 0.0
        for index in range(1, 23):  # the window that reaches it first, found by search
            window = next(k for k in range(23) if k * step + context > index)
            logits = model(tokens[None, window * step : index])
            total -= logits[0, -1].log_softmax(-1)[tokens[index]].item()
    assert train.perplexity(model, tokens, context, stride) == pytest.approx(math.exp(total / 22), rel=1e-12)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    model = Language()
    for parameter in model.out.parameters():
        nn.init.zeros_(parameter)
    assert train.perplexity(model, torch.arange(11), context=4) == pytest.approx(11, rel=1e-6)  # float32


@pytest.mark.parametrize(("tokens", "context", "stride"), [([1], 4, None), ([1, 2, 3], 1, None), ([1, 2, 3], 2, 2)])
def test_perplexity_refuses_what_it_cannot_score(tokens: list[int], context: int, stride: int | None) -> None:
    with pytest.raises(ValueError, match=r"at least 2 tokens|context >= 2"):
        train.perplexity(Language(), torch.tensor(tokens), context, stride)
