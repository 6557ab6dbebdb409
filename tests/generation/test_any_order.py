"""Sigma-GPT: positions that are asked for, the burst, and rejection sampling."""

import itertools

import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.generation.any_order import conditionals, fill
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import (
    GRU,
    MLP,
    ALiBi,
    Attention,
    LayerNorm,
    LearnedPositions,
    PairedPositions,
    Placement,
    SinusoidalPositions,
    Spec,
    TargetPlacement,
)
from paperworks.nn.position.paired import PairedPositionTable
from paperworks.testbeds.orders import AnyOrder, in_order, random_orders


def model(length: int = 12, vocab: int = 7, mixer: Spec | None = None, position: Spec | None = None) -> DecoderModel:
    torch.manual_seed(0)
    block = Block(norm=LayerNorm(), mixer=mixer or Attention(heads=2), feedforward=MLP(hidden=32))  # type: ignore[arg-type]
    spec = Decoder(
        vocab_size=vocab,
        dim=16,
        depth=2,
        block=block,
        norm=LayerNorm(),
        position=position or PairedPositions(length=length),  # type: ignore[arg-type]
        init_std=0.5,
    )
    return spec.build().double().eval()


def test_both_halves_read_one_table() -> None:
    table = PairedPositions(length=6).build(8)
    nn.init.normal_(table.weight)  # type: ignore[arg-type]
    positions, asked = torch.tensor([[0, 4, 2]]), torch.tensor([[4, 2, 6]])
    stream = TargetPlacement(positions=positions, target_positions=asked).resolve(2, 3, torch.device("cpu"))
    out = table(torch.zeros(2, 3, 8), stream)
    weight = table.weight
    for t in range(3):
        expected = torch.cat((weight[positions[0, t]], weight[asked[0, t]]))  # type: ignore[index]
        assert torch.equal(out[0, t], expected)
        assert torch.equal(out[1, t], expected)


def test_asked_for_nothing_it_is_a_gpt_that_knows_the_next_position() -> None:
    gpt = model()
    tokens = torch.randint(7, (2, 9))
    spelled = gpt(tokens, TargetPlacement(positions=torch.arange(9)[None], target_positions=torch.arange(1, 10)[None]))
    assert torch.equal(gpt(tokens), spelled)


def test_identity_order_equals_left_to_right_training() -> None:
    rows = torch.randint(7, (3, 9))
    orders = random_orders(3, 9, torch.Generator().manual_seed(0), fraction=0.0)
    assert torch.equal(orders, torch.arange(9).expand(3, 9))
    total, count = train.next_token_loss(model(), in_order(rows, orders))
    plain, number = train.next_token_loss(model(), {"tokens": rows[:, :-1], "targets": rows[:, 1:]})
    assert torch.equal(total, plain)
    assert count == number == 24


def test_orders_begin_at_the_start_and_are_permutations() -> None:
    orders = random_orders(200, 6, torch.Generator().manual_seed(1))
    assert (orders[:, 0] == 0).all()
    assert torch.equal(orders.sort(1).values, torch.arange(6).expand(200, 6))
    firsts = torch.bincount(orders[:, 1], minlength=6)[1:]
    assert firsts.min() > 20  # 40 expected
    half = random_orders(2000, 8, torch.Generator().manual_seed(1), fraction=0.5)
    assert 0.45 < (half == torch.arange(8)).all(1).float().mean() < 0.55


def test_targets_stand_where_the_order_says() -> None:
    row = torch.tensor([[9, 8, 7, 6]])
    batch = in_order(row, torch.tensor([[0, 3, 1, 2]]))
    assert batch["tokens"].tolist() == [[9, 6, 8]]
    assert batch["targets"].tolist() == [[6, 8, 7]]
    assert batch["positions"].tolist() == [[0, 3, 1]]
    assert batch["target_positions"].tolist() == [[3, 1, 2]]


def test_a_curriculum_is_a_function_of_the_batch_and_runs_repeat() -> None:
    rows = [torch.arange(5).repeat(4, 1)] * 3
    batches = list(AnyOrder(rows, fraction=lambda number: float(number == 2), seed=3))
    assert torch.equal(batches[0]["positions"], torch.arange(4).repeat(4, 1))
    assert not torch.equal(batches[2]["positions"], torch.arange(4).repeat(4, 1))
    again = list(AnyOrder(rows, fraction=lambda number: float(number == 2), seed=3))
    assert all(torch.equal(a["target_positions"], b["target_positions"]) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("known", [1, 4])
def test_the_burst_equals_asking_one_at_a_time(known: int) -> None:
    gpt = model()
    positions = torch.tensor([0, 7, 3, 9])[:known]
    tokens = torch.randint(7, (3, known), generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([5, 1, 10, 2])
    found = conditionals(gpt, tokens, positions, wanted)
    for index, place in enumerate(wanted):
        asked = torch.cat((positions[1:], place[None]))[None]
        alone = gpt(tokens, TargetPlacement(positions=positions[None], target_positions=asked))[:, -1].log_softmax(-1)
        assert torch.allclose(found[:, index], alone, atol=1e-12)


def _chance(gpt: DecoderModel, order: list[int], tokens: torch.Tensor) -> float:
    """p(tokens by position), position 0 given, read in an order."""
    places = torch.tensor([order])
    batch = in_order(tokens[None], places)
    logp = gpt(
        batch["tokens"], TargetPlacement(positions=batch["positions"], target_positions=batch["target_positions"])
    ).log_softmax(-1)
    return float(logp.gather(2, batch["targets"][..., None]).sum().exp())


def test_one_order_and_one_token_is_drawn_from_the_model() -> None:
    gpt = model(length=4, vocab=3)
    drawn = [
        int(fill(gpt, torch.tensor([[1]]), torch.tensor([0]), torch.tensor([2]), seed=seed).tokens)
        for seed in range(600)
    ]
    expected = conditionals(gpt, torch.tensor([[1]]), torch.tensor([0]), torch.tensor([2]))[0, 0].exp()
    found = torch.bincount(torch.tensor(drawn), minlength=3) / 600
    assert (found - expected).abs().max() < 0.07  # 3.4 standard deviations


def test_of_two_tokens_the_second_is_the_models_when_kept() -> None:
    """Naively: draw x from p, keep the first of the order, keep the second while u < q / p, else draw it from q."""
    gpt = model(length=3, vocab=3)
    start, at, wanted = torch.tensor([[1]]), torch.tensor([0]), torch.tensor([1, 2])
    p = conditionals(gpt, start, at, wanted)[0].exp()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            for first, second in ((0, 1), (1, 0)):
                x = (a, b)
                known = torch.tensor([[1, x[first]]])
                q = conditionals(gpt, known, torch.cat((at, wanted[first : first + 1])), wanted[second : second + 1])
                q = q[0, 0].exp()
                kept = p[second] * (q / p[second]).clamp(max=1)
                chance = kept[x[second]] + (1 - kept.sum()) * q[x[second]]
                expected[a, b] += 0.5 * p[first, x[first]] * chance
    assert abs(float(expected.sum()) - 1) < 1e-12
    many = fill(gpt, start.repeat(1000, 1), at, wanted, seed=5)
    found = torch.zeros(3, 3, dtype=torch.float64)
    found.index_put_((many.tokens[:, 0], many.tokens[:, 1]), torch.ones(1000, dtype=torch.float64), accumulate=True)
    assert (found / 1000 - expected).abs().max() < 0.05  # 3.3 standard deviations at most
    assert set(many.rounds.tolist()) == {1, 2}


class AskedOnly(PairedPositionTable):
    def forward(self, x: torch.Tensor, placement: Placement) -> torch.Tensor:
        assert isinstance(placement, TargetPlacement)
        assert placement.target_positions is not None
        return x + torch.cat((0 * self.weight[placement.target_positions], self.weight[placement.target_positions]), -1)


def test_where_nothing_depends_on_what_was_read_all_is_accepted_in_one_round() -> None:
    gpt = model()
    for block in gpt.blocks:
        block.mixer.output.weight.data.zero_()
    gpt.embedding.weight.data.zero_()
    gpt.position = AskedOnly(12, 16).double()
    filled = fill(gpt, torch.zeros(4, 1, dtype=torch.int64), torch.tensor([0]), torch.arange(1, 12), seed=0)
    assert filled.rounds.tolist() == [1] * 4
    assert filled.accepted == [[11]] * 4


def test_each_round_keeps_at_least_one_and_all_positions_are_filled() -> None:
    gpt = model()
    filled = fill(
        gpt, torch.tensor([[2, 3]]), torch.tensor([0, 6]), torch.tensor([1, 2, 3, 4, 5, 7, 8]), orders=3, seed=2
    )
    assert filled.tokens.shape == (1, 7)
    assert int(filled.tokens.max()) < 7
    assert sum(filled.accepted[0]) == 7
    assert min(filled.accepted[0]) >= 1
    again = fill(
        gpt, torch.tensor([[2, 3]]), torch.tensor([0, 6]), torch.tensor([1, 2, 3, 4, 5, 7, 8]), orders=3, seed=2
    )
    assert torch.equal(filled.tokens, again.tokens)


def test_rejected_tokens_leave_no_trace_in_the_cache() -> None:
    gpt = model()
    cache = gpt.new_cache(1, 8)
    tokens = torch.tensor([[1, 2, 3]])
    here, asked = torch.tensor([[0, 5, 2]]), torch.tensor([[5, 2, 4]])
    whole = gpt(tokens, TargetPlacement(positions=here, target_positions=asked))
    gpt(tokens[:, :2], TargetPlacement(positions=here[:, :2], target_positions=asked[:, :2], cache=cache))
    gpt(
        torch.tensor([[6, 6, 6]]),
        TargetPlacement(positions=torch.tensor([[8, 9, 10]]), target_positions=torch.tensor([[1, 1, 1]]), cache=cache),
    )
    cache.truncate(2)
    later = gpt(tokens[:, 2:], TargetPlacement(positions=here[:, 2:], target_positions=asked[:, 2:], cache=cache))
    assert torch.allclose(later[:, 0], whole[:, 2], atol=1e-12)


def test_caches_that_cannot_forget_say_so() -> None:
    recurrent = model(mixer=GRU(), position=SinusoidalPositions())
    cache = recurrent.new_cache(1, 4)
    recurrent(torch.tensor([[1, 2]]), Placement(cache=cache))
    with pytest.raises(ValueError, match="cannot be truncated"):
        cache.truncate(1)
    windowed = model(mixer=Attention(heads=2, window=2), position=SinusoidalPositions())
    cache = windowed.new_cache(1, 4)
    windowed(torch.tensor([[1, 2, 3]]), Placement(cache=cache))
    with pytest.raises(ValueError, match="cannot be truncated"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="holds 3 tokens and cannot be cut to 4"):
        cache.truncate(4)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: model(position=LearnedPositions(length=12)), "PairedPositions"),
        (lambda: model(mixer=GRU()), "only attention can obey"),
        (lambda: model(mixer=Attention(heads=2, window=3)), "a window or relative positions"),
        (lambda: model(mixer=Attention(heads=2, position=ALiBi())), "a window or relative positions"),
    ],
)
def test_models_that_cannot_be_asked_are_refused(made, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditionals(made(), torch.tensor([[1, 2]]), torch.tensor([0, 3]), torch.tensor([1, 2]))


def test_impossible_questions_are_refused() -> None:
    gpt = model()
    start = torch.tensor([[1]])
    with pytest.raises(ValueError, match="occurs twice"):
        conditionals(gpt, start, torch.tensor([0]), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="beyond the 12 learned positions"):
        conditionals(gpt, start, torch.tensor([0]), torch.tensor([13]))
    with pytest.raises(ValueError, match="orders must be at least 1"):
        fill(gpt, start, torch.tensor([0]), torch.tensor([3]), orders=0)
    with pytest.raises(ValueError, match="every position"):
        in_order(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 2, 2]]))
    with pytest.raises(ValueError, match="must say which tokens stand there"):
        train.next_token_loss(gpt, {"tokens": start, "target_positions": start})
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        gpt(torch.tensor([[1, 2]]), TargetPlacement(attention_mask=torch.ones(3, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="even dim"):
        PairedPositions(length=4).build(5)


def test_each_round_asks_given_exactly_what_was_kept() -> None:
    gpt = model()
    asked_of: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], options: dict, output: torch.Tensor) -> None:
        placement = inputs[1]
        if placement.attention_mask is not None:
            asked_of.append((placement.target_positions[0], output[0].log_softmax(-1)))

    handle = gpt.register_forward_hook(note, with_kwargs=True)
    order: list[int] = []
    filled = fill(gpt, torch.tensor([[2]]), torch.tensor([0]), torch.arange(1, 9), seed=3)
    handle.remove()
    assert len(asked_of) == int(filled.rounds) >= 3
    known = {0: 2}
    for (asked, said), (following, _) in zip(asked_of, [*asked_of[1:], (asked_of[0][0][:0], None)], strict=True):
        kept = [int(place) for place in asked if int(place) not in following.tolist()]
        best = torch.inf  # the order of those kept is not told: it is one of all orders
        for ways in itertools.permutations(order) if len(order) < 5 else [tuple(order)]:
            places = torch.tensor([0, *ways])
            tokens = torch.tensor([[known[int(place)] for place in places]])
            best = min(best, float((conditionals(gpt, tokens, places, asked)[0] - said).abs().max()))
        if len(order) < 5:
            assert best < 1e-10
        for place in kept:
            known[place] = int(filled.tokens[0, place - 1])
            order.append(place)
