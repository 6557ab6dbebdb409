import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.nn import auxiliary
from paperworks.train import step_log
from paperworks.train.batches import Source
from paperworks.train.step import Stepper

from .small import Language, classifier, examples, mean_loss, same_bits, summed_loss, weights

SGD = {"optimizer": train.SGD(), "schedule": "constant", "warmup": 0}


def unequal_rows() -> list[dict[str, Tensor]]:
    """Four rows of 3, 12, 7 and 5 tokens, padded to 12."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 11, (4, 12), generator=generator)
    lengths = torch.tensor([3, 12, 7, 5])
    segments = (torch.arange(12) < lengths[:, None]).long()
    return [{"tokens": tokens[i : i + 1], "segments": segments[i : i + 1]} for i in range(4)]


class Segmented(Language):
    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        logits = super().forward(tokens)
        auxiliary.add(0.3 * logits.square().sum(-1)[segments > 0].mean(), "size")
        return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_n_accumulated_micro_batches_equal_one_batch_of_all_their_tokens(dtype: torch.dtype, tolerance: float) -> None:
    rows = unequal_rows()
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    one, other = Language().to(dtype), Language().to(dtype)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return train.next_token_loss(lambda tokens, segments: model(tokens), batch)  # type: ignore[arg-type]

    common = {"lr": 0.1, "steps": 5, "log_every": 1, **SGD}
    accumulated = train.fit(one, loss, rows, train.Settings(accumulate=4, **common))
    at_once = train.fit(other, loss, [whole], train.Settings(**common))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=tolerance)
    assert accumulated.losses == pytest.approx(at_once.losses, abs=2 * tolerance)  # sums of about 50 in another order
    norms = [[record["grad_norm"] for record in report.records] for report in (accumulated, at_once)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)


def test_an_equal_mean_of_means_would_not_pass_the_bar_above() -> None:
    rows = unequal_rows()
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    model = Language()

    def mean(batch: dict[str, Tensor]) -> float:
        total, count = train.next_token_loss(lambda tokens, segments: model(tokens), batch)  # type: ignore[arg-type]
        return (total / count).item()

    assert abs(sum(map(mean, rows)) / 4 - mean(whole)) > 1e-3


def test_auxiliary_losses_weigh_by_count_so_that_accumulation_stays_exact() -> None:
    rows = unequal_rows()
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, kept = model(**batch), batch["segments"] > 0
        return functional.cross_entropy(logits[kept], batch["tokens"][kept], reduction="sum"), kept.sum()

    one, other = Segmented().double(), Segmented().double()
    common = {"lr": 0.1, "steps": 3, "log_every": 1, **SGD}
    accumulated = train.fit(one, loss, rows, train.Settings(accumulate=4, **common))
    at_once = train.fit(other, loss, [whole], train.Settings(**common))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-14)  # float64, values about 1
    sizes = [[record["auxiliary/size"] for record in report.records] for report in (accumulated, at_once)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)  # logged in float32
    plain = Language().double()
    assert not torch.allclose(weights(one)["out.weight"], plain.out.weight.data)


def test_scalar_losses_count_as_equal_parts() -> None:
    batches = [(x.double(), y) for x, y in examples(2, size=3) + examples(1, size=9)]
    one, other = classifier().double(), classifier().double()
    train.fit(one, mean_loss, batches, train.Settings(steps=1, lr=0.1, accumulate=3, **SGD))

    def mean_of_means(model: nn.Module, batch: list) -> Tensor:
        return torch.stack([mean_loss(model, each) for each in batch]).mean()

    train.fit(other, mean_of_means, [batches], train.Settings(steps=1, lr=0.1, **SGD))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("clip", [None, 0.05, 1e4])
def test_the_loop_takes_the_very_steps_of_a_loop_written_out(clip: float | None) -> None:
    settings = train.Settings(
        steps=12, lr=0.02, warmup=3, clip=clip, optimizer=train.AdamW(weight_decay=0.1), log_every=1
    )
    one, other = classifier(dropout=0.3), classifier(dropout=0.3)
    report = train.fit(one, mean_loss, examples(), settings)

    torch.manual_seed(settings.seed)
    matrices, vectors = [other[0].weight, other[3].weight], [other[0].bias, other[3].bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, fused=True)
    norms, losses = [], []
    for index in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * settings.factor(index)
        loss = mean_loss(other, examples()[index % 6])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([*matrices, *vectors], clip or math.inf).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert same_bits(weights(one), weights(other))
    assert report.losses == losses
    assert [record["grad_norm"] for record in report.records] == norms
    assert [record["lr"] for record in report.records] == [0.02 * settings.factor(index) for index in range(12)]


def test_adamw_takes_the_steps_of_torchs_unfused_one() -> None:
    one, other = classifier(), classifier()
    common = train.Settings(steps=10, lr=0.01)
    train.fit(one, mean_loss, examples(), common)
    unfused = replace(common, optimizer=lambda groups: torch.optim.AdamW(groups, fused=False, foreach=False))
    train.fit(other, mean_loss, examples(), unfused)
    for name, tensor in weights(one).items():
        # ten updates of at most 0.01, each rounded differently by a few float32 eps
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
def test_the_averaged_gradient_is_clipped_exactly_as_torch_clips_it(clip: float) -> None:
    model, reference = classifier(), classifier()
    rows = examples(3, size=2) + examples(1, size=7)
    seen: list[list[Tensor]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    def in_order(groups: list[dict]) -> Spy:  # the norm of the same numbers in another order may be rounded otherwise
        return Spy(model.parameters(), lr=0.1)

    settings = train.Settings(steps=1, lr=0.1, accumulate=4, clip=clip, **SGD | {"optimizer": in_order})
    report = train.fit(model, summed_loss, rows, settings)
    for row in rows:
        summed_loss(reference, row)[0].backward()
    for parameter in reference.parameters():
        parameter.grad.div_(sum(len(y) for _, y in rows))
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
    assert report.records[0]["grad_norm"] == norm.item()
    assert all(torch.equal(one, p.grad) for one, p in zip(seen[0], reference.parameters(), strict=True))


def test_groups_with_rates_of_their_own_keep_their_proportion() -> None:
    model = classifier()
    seen = []

    def two_rates(groups: list[dict]) -> torch.optim.Optimizer:
        made = torch.optim.SGD([{**group, "lr": 0.1 * (index + 1)} for index, group in enumerate(groups)])
        made.register_step_pre_hook(lambda opt, args, kwargs: seen.append([g["lr"] for g in opt.param_groups]))
        return made

    train.fit(
        model,
        mean_loss,
        examples(),
        train.Settings(steps=4, schedule="linear", warmup=0, min_lr=0.0, optimizer=two_rates),
    )
    assert seen == [pytest.approx([0.1 * (1 - k / 4), 0.2 * (1 - k / 4)], abs=1e-15) for k in range(4)]


def test_gradients_left_by_somebody_else_do_not_enter_the_first_step() -> None:
    one, other = classifier(), classifier()
    mean_loss(one, examples(1, seed=9)[0]).backward()
    for model in (one, other):
        train.fit(model, mean_loss, examples(), train.Settings(steps=2))
    assert same_bits(weights(one), weights(other))
    assert all(parameter.grad is None for parameter in one.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_weights_before_it(accumulate: int) -> None:
    batches = examples(6)
    batches[4][0][0, 0] = float("nan")
    model, good = classifier(), classifier()
    settings = {"lr": 0.01, "schedule": "constant", "warmup": 0, "accumulate": accumulate}
    with pytest.raises(train.Diverged, match=rf"the loss is nan at step {4 // accumulate + 1}, batch 4 of epoch 0"):
        train.fit(model, mean_loss, batches, train.Settings(steps=10, **settings))
    train.fit(good, mean_loss, batches, train.Settings(steps=4 // accumulate, **settings))
    assert same_bits(weights(model), weights(good))


class _Blown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, above: Tensor) -> Tensor:
        return above * float("inf")


def blown_on(number: int) -> object:
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = mean_loss(model, batch)
        return _Blown.apply(value) if next(calls) == number else value

    return loss


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied() -> None:
    model, good = classifier(), classifier()
    settings = {"lr": 0.01, "schedule": "constant", "warmup": 0}
    with pytest.raises(train.Diverged, match=r"the norm of the gradient is (inf|nan) at step 3, batch 2 of epoch 0"):
        train.fit(model, blown_on(2), examples(), train.Settings(steps=10, **settings))  # type: ignore[arg-type]
    train.fit(good, mean_loss, examples(), train.Settings(steps=2, **settings))
    assert same_bits(weights(model), weights(good))


@pytest.mark.parametrize("broken", ["loss", "gradient", "count", None])
def test_where_reading_is_deferred_no_update_follows_a_step_that_is_not_finite(broken: str | None) -> None:
    # as on a GPU, where each reading would wait for the device; the fused kernel on the CPU obeys the same flag
    model, good = classifier(), classifier()
    batches = examples(6)
    if broken == "loss":
        batches[3][0][0, 0] = float("nan")
    settings = train.Settings(steps=10, lr=0.01, schedule="constant", warmup=0, clip=0.5)
    blown = blown_on(3 if broken == "gradient" else -1)
    calls = iter(range(10))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        count = 0 if broken == "count" and next(calls) == 3 else 5
        return blown(model, batch) * 5, torch.tensor(count)  # type: ignore[operator]

    def stepper(model: nn.Module, loss: object) -> Stepper:
        groups = train.parameter_groups(model, settings)
        return Stepper(model, loss, torch.optim.AdamW(groups, fused=True), settings, torch.device("cpu"))  # type: ignore[arg-type]

    immediate, deferred = stepper(good, mean_loss), stepper(model, loss)
    deferred.log.deferred = True
    for each, steps in ((immediate, 3 if broken else 6), (deferred, 6)):
        source = Source(batches if each is deferred else examples(6), recording=False)
        for number in range(1, steps + 1):
            each.take(source, number)
    if broken is None:
        losses = [result.loss for result in immediate.log.read()]
        assert [result.loss for result in deferred.log.read()] == pytest.approx(losses, rel=1e-6)
    elif broken == "count":
        with pytest.raises(ValueError, match="counted 0 elements at step 4, batch 3 of epoch 0"):
            deferred.log.read()
    else:
        with pytest.raises(train.Diverged, match=r"is (nan|inf) at step 4, batch 3 of epoch 0"):
            deferred.log.read()
    for name, tensor in weights(model).items():
        # loss * 5 / 5 rounds once more in float32; updates are of 0.01
        torch.testing.assert_close(tensor, weights(good)[name], rtol=0, atol=1e-6)


def test_bfloat16_autocast_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    seen = set()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        seen.add(logits.dtype)
        return functional.cross_entropy(logits.float(), batch[1])

    model = classifier()
    report = train.fit(model, loss, examples(1), train.Settings(steps=60, lr=0.05, precision="bfloat16"))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.losses[-1] < 0.5 * report.losses[0]


def test_float16_scales_the_loss_and_takes_nearly_the_float32_steps() -> None:
    one, other = classifier(), classifier()
    reports = [
        train.fit(
            model, summed_loss, examples(4), train.Settings(steps=10, precision=precision, accumulate=2, clip=None)
        )
        for model, precision in ((one, "float16"), (other, "float32"))
    ]
    # float16 keeps 11 bits of each activation: 1e-3 of a loss near 1
    assert reports[0].losses == pytest.approx(reports[1].losses, abs=5e-3)
    assert not same_bits(weights(one), weights(other))


def test_a_float16_overflow_lowers_the_scale_and_training_goes_on() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean_loss(model, batch) * 1e3  # times the first scale, 2^16, its gradient leaves float16

    model = classifier()
    before = weights(model)
    train.fit(model, loss, examples(1), train.Settings(steps=1, precision="float16"))
    assert same_bits(weights(model), before)  # the step was skipped
    train.fit(model, loss, examples(1), train.Settings(steps=30, precision="float16"))
    assert not same_bits(weights(model), before)


def test_a_float16_step_whose_norm_overflows_is_skipped_though_each_number_is_finite() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model[0].weight * 1e30).sum()  # 32 squares of 1e30 leave float32

    model = classifier()
    before = weights(model)
    train.fit(model, loss, examples(1), train.Settings(steps=1, precision="float16", clip=None))
    assert same_bits(weights(model), before)


def test_a_float16_gradient_that_stays_broken_stops_the_run() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _Blown.apply(mean_loss(model, batch))

    with pytest.raises(train.Diverged, match=f"at step {step_log.SKIPPED_IN_A_ROW + 1}"):
        train.fit(classifier(), loss, examples(1), train.Settings(steps=100, precision="float16"))


def test_float16_weights_are_refused_for_float16_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is float16"):
        train.fit(classifier().half(), mean_loss, examples(1), train.Settings(steps=1, precision="float16"))


@pytest.mark.parametrize(
    ("returned", "error", "said"),
    [
        (lambda loss: loss.item(), TypeError, "the loss returned float; expected a scalar tensor"),
        (lambda loss: loss.detach(), ValueError, "the loss carries no gradient"),
        (lambda loss: loss.expand(2), ValueError, r"the loss has shape \(2,\)"),
        (lambda loss: (loss, 0), ValueError, "counted 0 elements at step 1, batch 0 of epoch 0"),
        (lambda loss: (loss, -1), ValueError, "the count is -1"),
        (lambda loss: (loss, torch.ones(2)), ValueError, r"the count has shape \(2,\)"),
        (lambda loss: (loss, 1, 2), TypeError, r"returned \(Tensor, int, int\)"),
        (lambda loss: ({"a": 1},), TypeError, r"returned \(dict\)"),
        (lambda loss: (loss, {"a": torch.ones(2)}), ValueError, r"a metric has shape \(2,\)"),
    ],
)
def test_a_loss_that_returns_something_else_is_told_so(returned: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        train.fit(
            classifier(),
            lambda model, batch: returned(mean_loss(model, batch)),  # type: ignore[operator]
            examples(1),
            train.Settings(steps=1),
        )


def test_a_micro_batch_without_targets_is_fine_as_long_as_another_has_some() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> tuple[Tensor, int]:
        x, y, count = batch
        total, _ = summed_loss(model, (x, y))
        return (total, count) if count else (total * 0, 0)

    (x, y), (v, w) = examples(2)
    one, other = classifier(), classifier()
    train.fit(one, loss, [(x, y, 5), (v, w, 0)], train.Settings(steps=1, accumulate=2, **SGD))
    train.fit(other, summed_loss, [(x, y)], train.Settings(steps=1, **SGD))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-7)  # float32, one rounding of 0.001
    with pytest.raises(ValueError, match="counted 0 elements"):
        train.fit(one, loss, [(x, y, 0), (v, w, 0)], train.Settings(steps=1, accumulate=2, **SGD))


def test_a_loss_that_reaches_only_what_is_not_optimized_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="no parameter that is optimized got a gradient at step 1"):
        train.fit(
            model,
            lambda model, batch: model[0](batch[0]).square().mean(),
            examples(1),
            train.Settings(steps=1, optimizer=lambda groups: torch.optim.SGD(model[3].parameters(), lr=0.1)),
        )
