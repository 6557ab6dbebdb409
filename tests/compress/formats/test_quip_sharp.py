import itertools

import pytest
import torch

from paperworks.compress.calibration.ldlq import feedback_factor, ldlq, proxy_loss
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats import e8p
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.formats.quip_sharp import QuIPSharp
from paperworks.compress.linear import CompressedLinear
from paperworks.kernels import hadamard
from tests.compress.formats.test_quip import correlated, normal, statistics


def test_the_codebook_has_65536_distinct_points_of_the_shifted_lattice():
    table = e8p.table()
    assert table.shape == (65_536, 8)
    assert len(torch.unique(table, dim=0)) == 65_536
    shift = torch.where(torch.arange(65_536) % 2 == 1, 0.25, -0.25)[:, None]
    unshifted = table - shift
    assert torch.equal((2 * unshifted) % 2, torch.ones_like(unshifted))  # halves of odd numbers
    assert torch.equal(unshifted.sum(1) % 2, torch.zeros(65_536))  # D8 + 1/2: an even sum, before the shift
    size = unshifted.abs()
    assert len(torch.unique(size, dim=0)) == 256
    assert set(size.square().sum(1).tolist()) == {2.0, 4.0, 6.0, 8.0, 10.0, 12.0}


def test_227_patterns_reach_a_norm_of_10_and_29_have_12():
    sizes = e8p.magnitudes().square().sum(1)
    assert int((sizes <= 10).sum()) == 227
    assert int((sizes == 12).sum()) == 29
    counted = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    assert {tuple(row) for row in e8p.magnitudes()[:227].tolist()} == set(counted)


def test_the_fast_search_finds_what_brute_force_finds():
    """Vectors from inside the codebook's ball to far outside of it; the paper's claim takes 10,000, a test 1,200."""
    draws = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.3, 1.0, 1.5, 4.0]).repeat(300)[:, None]
    x, table = spread * torch.randn(1200, 8, generator=draws), e8p.table()
    found = table[e8p.nearest(x)]
    norms = table.square().sum(1) / 2
    best = table[torch.cat([(chunk @ table.T - norms).max(1).indices for chunk in x.split(20)])]
    apart = (found - x).double().square().sum(1) - (best - x).double().square().sum(1)
    assert apart.abs().max() < 1e-4  # scores of up to 1e2 in float32: two points may be equally near
    assert (found == best).all(1).float().mean() > 0.999


def test_points_are_their_own_nearest():
    assert torch.equal(e8p.nearest(e8p.table()), torch.arange(65_536))
    assert torch.equal(e8p.nearest_residual(e8p.residual_table()), torch.arange(256))


def test_the_residual_codebook_is_241_lattice_points_and_15_axes():
    book = e8p.residual_table()
    assert len(torch.unique(book, dim=0)) == 256
    sizes = book.square().sum(1)
    assert [int((sizes == n).sum()) for n in (0, 2, 4)] == [1, 240, 15]
    assert not (book == -2 * torch.eye(8)[7]).all(1).any()


def test_errors_on_normal_weights_are_the_measured_ones():
    """Catalogue: 0.0912 at scale 1.03 and 0.0990 at 0.9, within 1% and the noise of 16k samples; Lloyd-Max 0.1175."""
    x = torch.randn(16_384, 8, generator=torch.Generator().manual_seed(0))
    for scale, expected in ((1.03, 0.0912), (0.9, 0.0990)):
        error = (e8p.table()[e8p.nearest(scale * x)] / scale - x).square().mean()
        assert abs(error / expected - 1) < 0.015


@pytest.mark.parametrize("width", [1, 3, 8, 12, 20, 28, 36, 44, 97, 100, 192, 576, 1536])
def test_transforms_are_orthogonal_for_every_width(width):
    x = normal(2, width)
    turned = hadamard.transform(x)
    assert torch.allclose(hadamard.transform(turned, inverse=True), x, atol=1e-12)
    assert torch.allclose(turned.square().sum(1), x.square().sum(1), rtol=1e-12)
    assert hadamard.is_hadamard(width) == (width not in (3, 97, 100))
    first = hadamard.transform(torch.eye(width, dtype=torch.float64)[0])
    if hadamard.is_hadamard(width):
        assert torch.allclose(first.abs(), torch.full_like(first, width**-0.5), atol=1e-12)


def test_paleys_matrices_are_hadamard():
    for order in (12, 20, 24, 28, 36, 44, 60):
        matrix = hadamard.paley(order)
        assert torch.equal(matrix.abs(), torch.ones(order, order))
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    assert hadamard.paley(16) is None
    assert torch.equal(hadamard.sylvester(3) @ hadamard.sylvester(3).T, 8 * torch.eye(8))


def test_the_fast_transform_is_the_kronecker_product():
    dense = torch.kron(hadamard.sylvester(4), hadamard.paley(36)).double() / 24
    assert torch.allclose(hadamard.transform(torch.eye(576, dtype=torch.float64)), dense.T, atol=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        hadamard.factors(0)


def test_block_feedback_equals_the_equation_written_block_by_block():
    moment, weight = correlated(24).float(), normal(5, 24).float()

    def nearest(x):
        codes = e8p.nearest(x)
        return e8p.table()[codes], codes[:, None]

    # U of H = (U + I) D (U + I)^T by elimination of blocks from the right
    rest, unit = moment.double(), torch.zeros(24, 24, dtype=torch.float64)
    for start in (16, 8, 0):
        block = slice(start, start + 8)
        unit[: start + 8, block] = rest[: start + 8, block] @ torch.linalg.inv(rest[block, block])
        rest = rest - unit[:, block] @ rest[block, block] @ unit[:, block].T
    expected = torch.zeros(5, 24)
    for start in (0, 8, 16):
        block = slice(start, start + 8)
        errors = (weight - expected)[:, :start].double()
        expected[:, block] = nearest((weight[:, block].double() + errors @ unit[:start, block]).float())[0]
    assert torch.equal(ldlq(weight, feedback_factor(moment, 8), nearest, 8)[0], expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_equals_dense_matrices(bits):
    weight, form = normal(12, 24).float(), QuIPSharp(bits=bits)
    stored = form.encode(weight, statistics(correlated(24)))
    codes = stored["codes"].long() & 0xFFFF
    points = e8p.table()[codes]
    if bits == 3:
        points = points + e8p.residual_table()[stored["residual_codes"].long()] / 2.04
    if bits == 4:
        points = points + e8p.table()[stored["residual_codes"].long() & 0xFFFF] / 3.45
    bit = [1 - 2 * ((stored[f"signs_{side}"][i // 8] >> i % 8) & 1).double() for side, n in (("out", 12), ("in", 24))
           for i in range(n)]  # fmt: skip
    out, into = torch.diag(torch.stack(bit[:12])), torch.diag(torch.stack(bit[12:]))
    left = hadamard.paley(12).double() / 12**0.5 @ out
    right = torch.kron(hadamard.sylvester(1), hadamard.paley(12)).double() / 24**0.5 @ into
    expected = left.T @ (points.view(12, 24).double() * stored["scale"].double()) @ right
    assert torch.allclose(form.decode(stored, (12, 24)).double(), expected, atol=1e-5)


def test_passes_and_bits_lower_the_loss_and_the_lattice_beats_the_scalar_grid():
    weight, moment = normal(48, 64), correlated(64)

    def loss(form):
        return proxy_loss(form.decode(form.encode(weight, statistics(moment)), (48, 64)).double() - weight, moment)

    plain, tuned = loss(QuIPSharp(passes=0)), loss(QuIPSharp())
    assert tuned < plain
    assert plain < 0.9 * loss(QuIP())
    assert loss(QuIPSharp(bits=4)) < 0.3 * loss(QuIPSharp(bits=3)) < 0.3 * tuned


@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (48, 64)])
def test_bits_are_those_stored(shape):
    for form in (QuIPSharp(), QuIPSharp(bits=3), QuIPSharp(bits=4), QuIPSharp(signs="float16")):
        stored = form.encode(torch.zeros(shape), Statistics.neutral(shape[1]))
        assert form.bits_per_weight(shape) == 8 * sum(t.nbytes for t in stored.values()) / (shape[0] * shape[1])
    assert QuIPSharp().bits_per_weight((4096, 4096)) == 2 + (2 * 4096 + 32) / 4096**2


def test_merging_keeps_signs_and_scale_and_what_is_stored_is_its_own_nearest():
    weight, form = normal(12, 24).float(), QuIPSharp()
    layer = CompressedLinear(form, weight, statistics=statistics(correlated(24)))
    before, held = layer.decoded_weight(), {name: t.clone() for name, t in layer.stored.items()}
    layer.encode_weight(before)
    assert all(torch.equal(layer.stored[name], held[name]) for name in held)
    layer.encode_weight(before + 0.8 * normal(12, 24, seed=5).float())
    assert all(torch.equal(layer.stored[name], held[name]) for name in ("scale", "signs_in", "signs_out"))
    assert not torch.equal(layer.stored["codes"], held["codes"])


def test_signs_kept_as_numbers_get_gradients_and_bits_give_the_same_weight():
    weight, moment = normal(12, 24).float(), statistics(correlated(24))
    bits, form = QuIPSharp(), QuIPSharp(signs="float16")
    stored = form.encode(weight, moment)
    assert torch.equal(form.decode(stored, (12, 24)), bits.decode(bits.encode(weight, moment), (12, 24)))
    learned = {name: stored[name].double().float().requires_grad_() for name in form.continuous}
    probe = normal(12, 24).float()
    (form.decode(stored | learned, (12, 24)) * probe).sum().backward()
    for name, tensor in learned.items():  # decode is linear in each of them: the slope is the value without the rest
        for place in (0, len(tensor) - 1):
            alone = tensor.detach().clone() * 0
            alone[place] = 1.0
            slope = (form.decode(stored | {name: alone}, (12, 24)) * probe).sum()
            assert abs(slope - tensor.grad[place]) < 1e-4


def test_wrong_use_says_what_to_do():
    with pytest.raises(ValueError, match="must be 2, 3 or 4"):
        QuIPSharp(bits=1)
    with pytest.raises(ValueError, match="use QuIP, which takes any shape"):
        QuIPSharp().encode(torch.zeros(3, 12), Statistics.neutral(12))
    with pytest.raises(ValueError, match="calibration"):
        QuIPSharp().encode(torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"QuIPSharp.passes"):
        QuIPSharp(passes=-1)
    with pytest.raises(ValueError, match=r"QuIPSharp.damping"):
        QuIPSharp(damping=0.0)
