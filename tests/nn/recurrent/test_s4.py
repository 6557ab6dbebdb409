"""S4 against the dense complex system, written from the equations without its spectrum; HiPPO against polynomials."""

import math

import pytest
import torch
from torch.nn import functional

from paperworks.kernels.fft import causal_convolution, fft_convolution
from paperworks.nn import Placement
from paperworks.nn.recurrent import hippo
from paperworks.nn.recurrent.documents import Documents
from paperworks.nn.recurrent.s4 import S4, kernel_by_spectrum


def module_of(dim=3, **options):
    torch.manual_seed(0)
    return S4(**{"state": 16, "length": 40, **options}).build(dim).double()


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_kernel(module, length, truncated):
    """K_i = C Ab^i Bb with all modes, both of each pair, as dense complex matrices; `truncated`: for what length."""
    rows = []
    for channel in range(len(module.skip)):
        half = torch.complex(-module.log_decay[channel].exp(), module.frequency[channel])
        values = torch.cat((half, half.conj()))
        both = [torch.view_as_complex(part[channel]) for part in (module.into, module.out)]
        into, out = (torch.cat((part, part.conj())) for part in both)
        matrix = torch.diag(values)
        if module.low_rank is not None:
            rank = torch.view_as_complex(module.low_rank[channel])
            rank = torch.cat((rank, rank.conj()))
            matrix = matrix - torch.outer(rank, rank.conj())
        step, same = module.log_step[channel].exp(), torch.eye(len(values), dtype=values.dtype)
        left = torch.linalg.inv(same - step / 2 * matrix)
        discrete, drive = left @ (same + step / 2 * matrix), left @ (step * into)
        if truncated:
            power = same
            for _ in range(truncated):
                power = power @ discrete
            out = torch.linalg.solve((same - power).T, out)
        kernel = []
        for _ in range(length):
            kernel.append((out * drive).sum())
            drive = discrete @ drive
        rows.append(torch.stack(kernel))
    found = torch.stack(rows)
    assert found.imag.abs().max() < 1e-10  # conjugate pairs: the kernel is real
    return found.real


@pytest.mark.parametrize("initial", ["legs", "random"])
@pytest.mark.parametrize("kernel", ["nplr", "diagonal"])
@pytest.mark.parametrize("length", [40, 33, 7, 1])  # even lengths hold z = -1
def test_the_kernel_by_its_spectrum_is_that_of_the_powers_with_its_gradients(kernel, initial, length):
    module = module_of(kernel=kernel, initial=initial)
    expected = dense_kernel(module, length, 40 if kernel == "nplr" else 0)
    found = module.kernel(length, torch.float64)
    assert found.shape == (3, length)
    assert (found - expected).abs().max() < 1e-10 * max(1.0, expected.abs().max())
    parameters = [p for name, p in module.named_parameters() if name != "skip" and "output" not in name]
    upstream = draws(3, length)
    ours = torch.autograd.grad((found * upstream).sum(), parameters)
    theirs = torch.autograd.grad((expected * upstream).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-8 * max(1.0, other.abs().max())


@torch.no_grad()
def test_longer_sequences_than_the_learned_length_go_on_with_the_same_system():
    module = module_of(length=20)
    expected = dense_kernel(module, 90, 20)
    for length in (21, 90):
        assert (module.kernel(length, torch.float64) - expected[:, :length]).abs().max() < 1e-11


@torch.no_grad()
def test_the_point_where_g_has_a_pole_is_its_limit():
    """At z = -1 the generating function is Delta / 2 times the sum of C_n B_n (catalogue, s4)."""
    module = module_of()
    kernel = module.kernel(40, torch.float64)
    at = (kernel * (-1.0) ** torch.arange(40)).sum(1)
    products = torch.view_as_complex(module.out) * torch.view_as_complex(module.into)
    assert (at - module.log_step.exp() / 2 * 2 * products.real.sum(1)).abs().max() < 1e-12


@torch.no_grad()
def test_at_first_c_is_normal_whatever_the_length():
    """What is stored is C (I - Ab^length): without that factor short lengths would blow C up."""
    for length in (4, 400):
        torch.manual_seed(0)
        module = S4(state=16, length=length).build(200)
        out = module._system().out
        assert abs(out.square().mean().item() - 2) < 0.15  # twice re and im of variance 1/2, 3,200 draws
        assert ((module.log_step >= math.log(1e-3)) & (module.log_step <= math.log(1e-1))).all()


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["nplr", "diagonal"])
def test_float32_is_close_at_full_size(kernel):
    torch.manual_seed(0)
    module = S4(kernel=kernel, length=512).build(8)
    single = module.kernel(512)
    double = module.double().kernel(512, torch.float64)
    assert (single - double).abs().max() < 3e-4 * double.abs().max()  # resonances: 650 times float32's 6e-8, and C


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["nplr", "diagonal"])
def test_convolution_is_the_recurrence_beyond_the_direct_sum(kernel):
    module = module_of(kernel=kernel, length=100)
    x, cache = draws(2, 70, 3), module.new_cache(2, 70, torch.float64, torch.device("cpu"))
    whole = module(x, Placement().resolve(2, 70, x.device))
    parts = [
        module(part, Placement().resolve(2, part.shape[1], x.device).at(cache)) for part in x.split([40, 1, 29], 1)
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert cache["state"].shape == (2, 3, 16)
    segments = torch.tensor([[1] * 45 + [2] * 25, [0] * 10 + [5] * 60])
    packed = module(x, Placement(segments=segments).resolve(2, 70, x.device))
    assert (packed[:1, 45:] - module(x[:1, 45:], Placement().resolve(1, 25, x.device))).abs().max() < 1e-12
    assert (packed[1:, 10:] - module(x[1:, 10:], Placement().resolve(1, 60, x.device))).abs().max() < 1e-12


def test_a_cache_of_a_changed_model_is_not_trusted_while_gradients_are_on():
    module = module_of()
    x = draws(1, 6, 3)
    cache = module.new_cache(1, 12, torch.float64, x.device)
    with torch.no_grad():
        module(x, Placement().resolve(1, 6, x.device).at(cache))
    assert cache.system is not None
    module(x, Placement().resolve(1, 6, x.device).at(cache)).sum().backward()
    assert module.out.grad.abs().max() > 0


@torch.no_grad()
def test_half_precision_keeps_the_state_space_in_float32():
    module = S4(state=8, length=64).build(4)
    x = torch.randn(2, 50, 4)
    expected = module(x, Placement().resolve(2, 50, x.device))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x, Placement().resolve(2, 50, x.device))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # bfloat16 has 8 bits
    short, long = (module.new_cache(2, size, torch.bfloat16, x.device) for size in (8, 100_000))
    assert short.bytes() == long.bytes()
    assert short["state"].dtype == torch.float32


def test_state_space_parameters_are_not_decayed():
    from paperworks.train.optim.parameter_groups import undecayed

    module = S4(state=8).build(4)
    own = module.state_space_parameters()
    assert len(own) == 7
    assert {id(parameter) for parameter in own} <= undecayed(module)
    assert id(module.output.weight) not in undecayed(module)


# ---- HiPPO


def test_legs_is_normal_plus_low_rank():
    matrix, into = hippo.legs(16)
    values, low_rank, drive = hippo.legs_modes(16)
    assert torch.equal(values.real, torch.full((8,), -0.5, dtype=torch.float64))
    assert (values.imag > 0).all()
    values = torch.cat((values, values.conj()))
    low_rank, drive = torch.cat((low_rank, low_rank.conj())), torch.cat((drive, drive.conj()))
    modes = torch.diag(values) - torch.outer(low_rank, low_rank.conj())
    # the same system in another basis: equal Markov parameters B* A^i B (V is unitary)
    ours, theirs = drive, into
    for _ in range(4):
        ours, theirs = modes @ ours / 10, matrix @ theirs / 10
        assert ((drive.conj() * ours).sum() - (into * theirs).sum()).abs() < 1e-9 * (into * theirs).sum().abs()


def test_the_impulse_response_is_legendre_polynomials_of_the_faded_age():
    matrix, into = hippo.legs(8)
    for age in (0.0, 0.3, 2.0):
        found = torch.linalg.matrix_exp(age * matrix) @ into
        faded = torch.tensor([math.exp(-age)], dtype=torch.float64)
        assert (found - faded * hippo.legendre(8, faded)[:, 0]).abs().max() < 1e-12


def test_the_scaled_state_of_a_monomial_is_its_legendre_series():
    """t c' = A c + B t^k is solved by c = t^k (k - A)^-1 B, which must be the coefficients of s^k."""
    matrix, into = hippo.legs(8)
    points = torch.linspace(0, 1, 50, dtype=torch.float64)
    for power in range(8):
        state = torch.linalg.solve(power * torch.eye(8, dtype=torch.float64) - matrix, into)
        assert (state @ hippo.legendre(8, points) - points**power).abs().max() < 1e-11


def test_random_modes_are_stable_and_of_the_same_form():
    torch.manual_seed(0)
    values, low_rank, into = hippo.random_modes(64)
    assert values.shape == low_rank.shape == into.shape == (32,)
    assert torch.equal(values.real, torch.full((32,), -0.5, dtype=torch.float64))
    assert 1.5 < values.imag.max() < 2.5  # the semicircle's edge is at 2
    assert abs(low_rank.abs().square().sum().item() * 2 - 64) < 40  # |P|^2 of 64 normal draws


# ---- convolution and documents


@pytest.mark.parametrize("time", [1, 2, 31, 33, 50])
def test_both_convolutions_are_the_sum_with_its_gradients(time):
    x, kernel = draws(2, time, 3).requires_grad_(), draws(3, time, seed=1).requires_grad_()
    expected = torch.stack(
        [sum(kernel[:, j] * x[:, t - j] for j in range(t + 1)) for t in range(time)],
        1,
    )
    upstream = draws(2, time, 3, seed=2)
    theirs = torch.autograd.grad((expected * upstream).sum(), (x, kernel))
    for convolve in (causal_convolution, fft_convolution):
        found = convolve(x, kernel)
        assert (found - expected).abs().max() < 1e-12
        for one, other in zip(torch.autograd.grad((found * upstream).sum(), (x, kernel)), theirs, strict=True):
            assert (one - other).abs().max() < 1e-12


def test_documents_go_one_a_row_and_come_back():
    begins = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    x = torch.arange(10).view(2, 5, 1) + 1
    documents = Documents(begins)
    assert documents.spread(x)[..., 0].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0], [8, 0, 0], [9, 10, 0]]
    assert torch.equal(documents.gather(documents.spread(x)), x)
    assert documents.last.tolist() == [1, 4]
    assert documents.opens.tolist() == [True, True, False, True, True]
    assert documents.row.tolist() == [0, 0, 1, 1, 1]
    shifted = Documents(begins, torch.tensor([7, 2]))
    assert shifted.width == 4
    assert shifted.spread(x)[2, :, 0].tolist() == [0, 0, 6, 7]
    assert shifted.filled()[2].tolist() == [False, False, True, True]
    assert torch.equal(shifted.gather(shifted.spread(x)), x)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4(state=7), r"S4\.state must be even and at least 2, got 7"),
        (lambda: S4(length=0), r"S4\.length must be at least 1, got 0"),
        (lambda: S4(step_min=0.1, step_max=0.01), r"S4\.step_min must be above 0 and at most step_max, got 0\.1"),
        (lambda: S4(kernel="dense"), r"S4\.kernel must be"),
        (lambda: hippo.legs(0), "state must be at least 1, got 0"),
        (lambda: hippo.legs_modes(5), "state must be even"),
        (
            lambda: causal_convolution(torch.zeros(1, 4, 3), torch.zeros(3, 5)),
            r"needs a kernel of shape \(3, 4\), got \(3, 5\)",
        ),
    ],
)
def test_wrong_sizes_say_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kernel_by_spectrum_needs_no_low_rank():
    module = module_of(kernel="diagonal")
    plain = kernel_by_spectrum(module.log_step, module.log_decay, module.frequency, module.into, module.out, None, 12)
    assert plain.shape == (3, 12)
    assert functional.mse_loss(plain, module.kernel(12, torch.float64)) > 0  # the factor of the truncation is missing
