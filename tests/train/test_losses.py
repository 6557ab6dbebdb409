import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.nn import Placement
from paperworks.train import losses

from .small import Language


class Recorded(nn.Module):
    """Returns the logits it was given, and keeps what it was called with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor, placement: Placement | None = None) -> Tensor:
        self.placement = placement
        return self.logits


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1))


def by_hand(logits: Tensor, pairs: list[tuple[int, int, int]]) -> float:
    logp = logits.log_softmax(-1)
    return -sum(logp[row, time, target].item() for row, time, target in pairs)


def test_each_position_predicts_the_token_after_it(logits: Tensor, tokens: Tensor) -> None:
    total, count = train.next_token_loss(Recorded(logits), tokens)
    pairs = [(row, time, int(tokens[row, time + 1])) for row in range(2) for time in range(5)]
    assert count == 10
    assert total.item() == pytest.approx(by_hand(logits, pairs), abs=1e-12)  # ten float64 additions


def test_explicit_targets_are_predicted_at_their_own_position_and_minus_100_is_ignored(
    logits: Tensor, tokens: Tensor
) -> None:
    targets = torch.full_like(tokens, -100)
    targets[0, 2], targets[1, 5] = 3, 7
    total, count = train.next_token_loss(Recorded(logits), {"tokens": tokens, "targets": targets})
    assert count == 2
    assert total.item() == pytest.approx(by_hand(logits, [(0, 2, 3), (1, 5, 7)]), abs=1e-12)


def test_nothing_is_learned_across_a_border_nor_at_padding(logits: Tensor, tokens: Tensor) -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
    model = Recorded(logits)
    total, count = train.next_token_loss(model, {"tokens": tokens, "segments": segments})
    inside = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (1, 4)]
    assert count == len(inside)
    expected = by_hand(logits, [(row, time, int(tokens[row, time + 1])) for row, time in inside])
    assert total.item() == pytest.approx(expected, abs=1e-12)
    assert model.placement.segments is segments


def test_a_model_without_segments_is_called_with_tokens_alone(logits: Tensor, tokens: Tensor) -> None:
    model = Recorded(logits)
    train.next_token_loss(model, {"tokens": tokens})
    assert model.placement is None


def test_a_packed_row_learns_what_its_documents_learn_apart() -> None:
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7]])
    weight = torch.randn(11, 11, dtype=torch.float64)  # a bigram model: no position sees another
    bigram = nn.Embedding.from_pretrained(weight)

    class Bigram(nn.Module):
        def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
            return bigram(tokens)

    packed = {"tokens": torch.cat([first, second], 1), "segments": torch.tensor([[1, 1, 1, 1, 2, 2, 2]])}
    total, count = train.next_token_loss(Bigram(), packed)
    apart = [train.next_token_loss(Bigram(), each) for each in (first, second)]
    assert count == sum(int(each[1]) for each in apart)
    assert total.item() == pytest.approx(sum(each[0].item() for each in apart), abs=1e-12)


def test_outputs_with_logits_are_read(logits: Tensor, tokens: Tensor) -> None:
    class Output:
        def __init__(self) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def forward(self, tokens: Tensor) -> Output:
            return Output()

    assert train.next_token_loss(Wrapped(), tokens)[0] == train.next_token_loss(Recorded(logits), tokens)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_lean_cross_entropy_equals_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK, "cpu", 3 * 29)  # chunks of 3 rows: 17 rows end in a chunk that is not full
    logits = (4 * torch.randn(17, 29, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.randint(0, 29, (17,), generator=torch.Generator().manual_seed(1))
    targets[::4] = losses.IGNORED
    lean, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    one, other = losses.cross_entropy_sum(lean, targets), losses.plain_cross_entropy_sum(plain, targets)
    (3 * one).backward()
    (3 * other).backward()
    assert one.dtype == other.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # exp(z - normalizer) carries the rounding of its argument, up to 12 eps here, times the gradient of 3 from above;
    # in bfloat16 the gradient itself is rounded: 3 * 2^-8
    relative = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    absolute = {torch.float64: 1e-14, torch.float32: 3 * 12 * 1.2e-7, torch.bfloat16: 3 * 2**-8}[dtype]
    assert one.item() == pytest.approx(other.item(), rel=relative)
    torch.testing.assert_close(lean.grad, plain.grad, rtol=0, atol=absolute)


def test_the_lean_cross_entropy_has_the_gradient_of_finite_differences() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, losses.IGNORED, 3, 3])
    assert torch.autograd.gradcheck(lambda z: losses.cross_entropy_sum(z, targets), logits)


def test_an_ignored_row_that_is_not_finite_harms_no_other() -> None:
    logits = torch.zeros(2, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = losses.cross_entropy_sum(logits, torch.tensor([1, losses.IGNORED]))
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_large_logits_take_the_lean_way_and_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = Language(), torch.randint(0, 11, (2, 6))
    plain, count = train.next_token_loss(model, tokens)
    monkeypatch.setattr(losses, "LEAN_FROM", 1)
    monkeypatch.delattr(losses, "plain_cross_entropy_sum")  # the other way is closed
    lean, same = train.next_token_loss(model, tokens)
    assert lean.item() == pytest.approx(plain.item(), rel=1e-6)  # float32
    assert count == same


def test_the_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = train.next_token_loss(Language(), torch.randint(0, 11, (2, 6)))
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([1, 2], "the batch is list"),
        ({"ids": torch.zeros(1, 2)}, "the batch is dict"),
    ],
)
def test_a_batch_of_another_kind_is_refused(batch: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        train.next_token_loss(Language(), batch)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.zeros(2, 3), r"torch\.float32 \(2, 3\); int64"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\); int64 \(batch, time\)"),
        ({"tokens": torch.ones(1, 4, dtype=torch.int64), "targets": torch.ones(1, 3)}, "targets has shape"),
        ({"tokens": torch.ones(1, 4, dtype=torch.int64), "segments": torch.ones(4)}, "segments has shape"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(batch: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train.next_token_loss(Language(), batch)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"returned \(2, 3\) for tokens \(1, 4\)"):
        train.next_token_loss(Recorded(torch.zeros(2, 3)), torch.ones(1, 4, dtype=torch.int64))


def test_the_plain_loss_is_torchs_cross_entropy() -> None:
    logits, targets = torch.randn(4, 5), torch.tensor([1, -100, 0, 4])
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    assert torch.equal(losses.plain_cross_entropy_sum(logits, targets), expected)


def test_label_smoothing_is_torchs_and_spares_excluded_tokens(logits: Tensor) -> None:
    flat = logits.flatten(0, 1).requires_grad_()
    targets = torch.randint(1, 11, (12,), generator=torch.Generator().manual_seed(1))
    targets[3] = -100
    found = losses.smoothed_cross_entropy_sum(flat, targets, 0.2)
    expected = functional.cross_entropy(flat, targets, label_smoothing=0.2, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.smoothed_cross_entropy_sum(flat, targets, 0.0).item() == pytest.approx(
        losses.plain_cross_entropy_sum(flat, targets).item(), rel=1e-12
    )
    logs, kept = flat.log_softmax(-1), targets != -100
    wanted = torch.full((12, 11), 0.2 / 10, dtype=torch.float64)
    wanted[:, 0] = 0.0  # padding
    wanted[kept] += 0.8 * functional.one_hot(targets[kept], 11).double()
    without = losses.smoothed_cross_entropy_sum(flat, targets, 0.2, excluded=(0,))
    assert without.item() == pytest.approx(-(wanted * logs)[kept].sum().item(), rel=1e-12)
    with pytest.raises(ValueError, match="smoothing must be in"):
        losses.smoothed_cross_entropy_sum(flat, targets, 1.0)
