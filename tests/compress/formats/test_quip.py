import pytest
import torch
from torch import nn

from paperworks import compress
from paperworks.compress.calibration.ldlq import descend, feedback_factor, ldlq, proxy_loss
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.incoherence import incoherence, kronecker_rotation
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.linear import CompressedLinear


def correlated(columns, tokens=400, seed=0):
    """The second moment of inputs whose directions differ a hundredfold in size, float64."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draws, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -2, columns, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=draws, dtype=torch.float64) @ mixing.T
    return x.T @ x / tokens


def normal(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(x):
    return x.round(), x.round()


def statistics(moment):
    return Statistics(count=400, second_moment=moment.float())


def test_the_factor_rebuilds_the_second_moment():
    for width in (1, 4):
        moment = correlated(24)
        unit = feedback_factor(moment, width) + torch.eye(24, dtype=torch.float64)
        blocks = torch.linalg.solve(unit, torch.linalg.solve(unit, moment).T)
        off = blocks.clone()
        for start in range(0, 24, width):
            off[start : start + width, start : start + width] = 0
        assert off.abs().max() < 1e-9 * moment.abs().max()  # float64, condition about 1e4
        assert torch.allclose(unit @ blocks @ unit.T, moment, rtol=0, atol=1e-10 * float(moment.abs().max()))


def test_ldlq_equals_the_equation_written_column_by_column():
    """What_k = round(W_k + (W - What)_{<k} U_{<k,k}) with U from an elimination written out here."""
    moment, weight = correlated(150), 3 * normal(5, 150)  # more columns than one lazy span of 128
    rest, unit = moment.clone(), torch.zeros(150, 150, dtype=torch.float64)
    for k in reversed(range(150)):
        unit[: k + 1, k] = rest[: k + 1, k] / rest[k, k]
        rest = rest - rest[k, k] * torch.outer(unit[:, k], unit[:, k])
    expected = torch.zeros_like(weight)
    for k in range(150):
        expected[:, k] = (weight[:, k] + (weight - expected)[:, :k] @ unit[:k, k]).round()
    rounded, codes = ldlq(weight, feedback_factor(moment), whole)
    assert torch.equal(rounded, expected)
    assert torch.equal(codes, expected)


def test_ldlq_is_gptq():
    """GPTQ: errors divided by the diagonal of the upper Cholesky factor of H^-1 go to the columns to the right."""
    moment, weight = correlated(40), 3 * normal(64, 40)
    factor = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    moved, expected = weight.clone(), torch.zeros_like(weight)
    for k in range(40):
        expected[:, k] = moved[:, k].round()
        moved[:, k + 1 :] -= torch.outer((moved[:, k] - expected[:, k]) / factor[k, k], factor[k, k + 1 :])
    assert torch.equal(ldlq(weight, feedback_factor(moment), whole)[0], expected)


def test_mean_losses_are_a_twelfth_of_the_traces():
    """Without clamping: tr(D)/12 a row with feedback, tr(H)/12 without; catalogue: within 2%."""
    moment, weight = correlated(24), 100 * torch.rand(20_000, 24, dtype=torch.float64)
    factor = feedback_factor(moment)
    unit = factor + torch.eye(24, dtype=torch.float64)
    pivots = torch.linalg.solve(unit, torch.linalg.solve(unit, moment).T).diagonal()
    assert pivots.sum() <= moment.trace()
    for feedback, expected in ((factor, pivots.sum() / 12), (torch.zeros_like(factor), moment.trace() / 12)):
        loss = proxy_loss(ldlq(weight, feedback, whole)[0] - weight, moment) / 20_000
        assert abs(loss / expected - 1) < 0.02


def test_rotations_are_orthogonal_for_every_width_and_keep_the_proxy_loss():
    for width in (1, 2, 7, 24, 60):
        turn = kronecker_rotation(width, 3)
        matrix = turn.apply(torch.eye(width, dtype=torch.float64))  # rows are Q e_i
        assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
        x = normal(3, width)
        assert torch.allclose(turn.apply(x), x @ matrix, atol=1e-12)
        assert torch.allclose(turn.invert(turn.apply(x)), x, atol=1e-12)
    error, moment, right, left = normal(7, 24), correlated(24), kronecker_rotation(24, 0), kronecker_rotation(7, 1)
    turned = left.apply(right.apply(error).T).T
    turned_moment = right.apply(right.apply(moment).T)
    assert abs(proxy_loss(turned, turned_moment) / proxy_loss(error, moment) - 1) < 1e-12


def test_rotation_halves_the_largest_entry_of_heavy_tails():
    weight = torch.distributions.StudentT(3.0).sample((256, 256)).double()
    turned = kronecker_rotation(256, 1).apply(kronecker_rotation(256, 0).apply(weight).T).T
    assert incoherence(turned) <= incoherence(weight) / 2


def test_greedy_passes_never_raise_the_loss_and_codes_follow_the_values():
    moment, weight = correlated(40), 2 * normal(9, 40)
    rounded, codes = whole(weight)
    before = proxy_loss(rounded - weight, moment)
    for _ in range(3):
        rounded, codes = descend(weight, rounded, codes, moment, whole, passes=1)
        after = proxy_loss(rounded - weight, moment)
        assert after <= before
        assert torch.equal(rounded, codes)
        before = after
    # at the end no single weight can be rounded better, which is what the passes look for
    rounded, _ = descend(weight, rounded, codes, moment, whole, passes=50)
    for step in (-1.0, 1.0):
        change = step * (2 * (rounded - weight) @ moment) + moment.diagonal()
        assert change.min() > -1e-9


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("processing", [True, False])
def test_encoding_equals_the_papers_algorithm_in_float64(bits, processing):
    """The steps of the catalogue one by one, with dense matrices, down to every code."""
    weight, moment = normal(6, 20), correlated(20)
    form = QuIP(bits=bits, processing=processing)
    decoded = form.decode(form.encode(weight, statistics(moment)), (6, 20))

    moment = moment.float().double()
    moment = moment / moment.diagonal().mean() + 0.01 * torch.eye(20, dtype=torch.float64)
    left, right, rescale = (torch.eye(n, dtype=torch.float64) for n in (6, 20, 20))
    if processing:
        scales = (moment.diagonal() / (weight.T @ weight).diagonal()) ** 0.25
        rescale = torch.diag((scales / scales.log().mean().exp()).half().double())
        right = kronecker_rotation(20, 0).apply(right).T
        left = kronecker_rotation(6, 1).apply(left).T
    turned = left @ weight @ rescale @ right.T
    turned_moment = right @ torch.linalg.inv(rescale) @ moment @ torch.linalg.inv(rescale) @ right.T
    top = 2**bits - 1
    scale = float((2.4 * turned.norm() / (6 * 20) ** 0.5).float())
    grid = top / 2 * (turned / scale + 1)
    unit = feedback_factor(turned_moment)
    codes = torch.zeros_like(grid)
    for k in range(20):
        codes[:, k] = (grid[:, k] + (grid - codes)[:, :k] @ unit[:k, k]).round().clamp(0, top)
    expected = left.T @ (scale * (2 * codes / top - 1)) @ right @ torch.linalg.inv(rescale)
    assert (decoded - expected).abs().max() < 1e-5 * expected.abs().max()  # decoding is float32


def test_feedback_processing_and_greedy_passes_each_lower_the_loss():
    draws = torch.Generator().manual_seed(0)
    weight = normal(48, 64) * torch.rand(64, generator=draws, dtype=torch.float64)
    moment = correlated(64)

    def loss(**fields):
        form = QuIP(**fields)
        return proxy_loss(form.decode(form.encode(weight, statistics(moment)), (48, 64)).double() - weight, moment)

    assert loss() < 0.6 * loss(rounding="nearest")
    assert loss() < 0.8 * loss(processing=False)
    assert loss(rounding="ldlq-rg") < loss()
    assert loss(bits=4) < loss(bits=3) < loss(bits=2)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (6, 20), (5, 97)])
def test_bits_are_those_stored(shape):
    for form in (QuIP(), QuIP(bits=3), QuIP(bits=2, processing=False)):
        stored = form.encode(normal(*shape), statistics(correlated(shape[1])))
        assert form.bits_per_weight(shape) == 8 * sum(t.nbytes for t in stored.values()) / (shape[0] * shape[1])
    assert QuIP().bits_per_weight((4096, 4096)) == 2 + 16 / 4096 + 64 / 4096**2


def test_merging_keeps_the_rotation_and_the_grid():
    weight, form = normal(12, 20).float(), QuIP(bits=4)
    layer = CompressedLinear(form, weight, statistics=statistics(correlated(20)))
    before, held = layer.decoded_weight(), {name: t.clone() for name, t in layer.stored.items()}
    layer.encode_weight(before)
    assert all(torch.equal(layer.stored[name], held[name]) for name in held)
    layer.encode_weight(before + 0.3)
    assert torch.equal(layer.stored["rescale"], held["rescale"])
    assert torch.equal(layer.stored["scale"], held["scale"])
    assert (layer.decoded_weight() - before - 0.3).abs().mean() < (before - weight).abs().mean() + 0.05


def test_another_seed_gives_another_rotation_and_is_read_from_what_is_stored():
    weight, moment = normal(12, 20), statistics(correlated(20))
    stored = QuIP(seed=7).encode(weight, moment)
    assert not torch.equal(stored["codes"], QuIP(seed=0).encode(weight, moment)["codes"])
    assert torch.equal(QuIP(seed=0).decode(stored, (12, 20)), QuIP(seed=7).decode(stored, (12, 20)))


def test_zeros_and_features_never_seen_are_no_trouble():
    moment = correlated(20)
    moment[3] = moment[:, 3] = 0
    for weight in (torch.zeros(6, 20), normal(6, 20) * (torch.arange(20) != 5)):
        for rounding in ("ldlq", "ldlq-rg", "nearest"):
            form = QuIP(rounding=rounding)
            assert torch.isfinite(form.decode(form.encode(weight, statistics(moment)), (6, 20))).all()
    assert torch.isfinite(QuIP().decode(QuIP().encode(weight, statistics(0 * moment)), (6, 20))).all()


def test_wrong_use_says_what_to_do():
    with pytest.raises(ValueError, match=r"QuIP.bits must be 1 to 8, got 9"):
        QuIP(bits=9)
    with pytest.raises(ValueError, match=r"QuIP.clip must be above 0"):
        QuIP(clip=0.0)
    with pytest.raises(ValueError, match=r"QuIP.damping must be above 0"):
        QuIP(damping=0.0)
    with pytest.raises(ValueError, match=r"QuIP.seed"):
        QuIP(seed=-1)
    with pytest.raises(ValueError, match="calibration"):
        compress.apply(nn.Sequential(nn.Linear(8, 8)), QuIP(), "0")
    with pytest.raises(ValueError, match="raise the damping"):
        feedback_factor(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="do not split into blocks of 8"):
        feedback_factor(torch.eye(12), 8)
