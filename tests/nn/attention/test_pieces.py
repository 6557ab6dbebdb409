"""Attention in pieces is attention under the dense mask, and its cost is that of what is seen."""

import pytest
import torch

from paperworks.nn import ALiBi, Attention, Placement, RoPE
from paperworks.nn.attention.attention import AttentionModule
from paperworks.nn.attention.mask import mask_of
from paperworks.nn.attention.pieces import Piece, band, dense_mask, documents, worthwhile

CPU = torch.device("cpu")


def lengths_to_segments(*rows: list[int]) -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)) + 1, torch.tensor(row)) for row in rows])


def naive_mask(segments: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    rows, time = segments.shape
    mask = torch.zeros(rows, 1, time, time, dtype=torch.bool)
    for row in range(rows):
        for query in range(time):
            for key in range(time):
                seen = bool(segments[row, query] == segments[row, key])
                seen &= not causal or key <= query
                seen &= window is None or key > query - window
                mask[row, 0, query, key] = seen
    return mask


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (True, 40), (True, 90)])
def test_pieces_show_what_the_dense_mask_shows(causal: bool, window: int | None) -> None:
    segments = lengths_to_segments([30, 70, 1, 19], [120, 0, 0, 0])
    pieces = documents(segments, causal=causal, window=window)
    assert pieces is not None
    assert torch.equal(dense_mask(pieces, 120, 120, CPU), naive_mask(segments, causal, window))


@pytest.mark.parametrize(
    ("time", "window"), [(300, 1), (300, 7), (300, 64), (300, 100), (130, 129), (130, 130), (65, 200)]
)
def test_a_band_shows_each_token_its_window(time: int, window: int) -> None:
    mask = dense_mask(tuple(band(time, window, CPU)), time, time, CPU)[0, 0]
    assert torch.equal(
        mask, torch.ones(time, time, dtype=torch.bool).tril() & ~torch.ones(time, time).tril(-window).bool()
    )


def test_a_segment_that_goes_on_later_is_left_to_the_mask() -> None:
    assert documents(torch.tensor([[1, 1, 2, 2, 1, 1]]), causal=True) is None


def test_pieces_are_taken_only_where_they_save_half() -> None:
    one = (Piece(slice(0, 1), slice(0, 100), slice(0, 100), causal=True),)
    assert not worthwhile(one, 1, 100, 100)
    four = tuple(Piece(slice(0, 1), slice(i, i + 250), slice(i, i + 250)) for i in range(0, 1000, 250))
    assert worthwhile(four, 1, 1000, 1000)


def outputs(module: AttentionModule, x: torch.Tensor, segments: torch.Tensor | None, dense: bool) -> torch.Tensor:
    """The module's output and gradients, with the dense mask forced by a listener to the pattern or not."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    if dense:  # an edited pattern is what counts, and it is computed under the dense mask
        handle = module.pattern.register_forward_hook(lambda *_: _[2] * 1.0)
    out = module(x, Placement(segments=segments).resolve(len(x), x.shape[1], x.device))
    if dense:
        handle.remove()
    gradients = torch.autograd.grad((out * torch.linspace(0, 1, out.shape[-1])).sum(), [x, *module.parameters()])
    return torch.cat([out.flatten(), *(gradient.flatten() for gradient in gradients)])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("window", "packed"), [(None, True), (20, True), (20, False)])
def test_outputs_and_gradients_equal_the_dense_ones(heads: tuple[int, int], window: int | None, packed: bool) -> None:
    torch.manual_seed(0)
    torch.manual_seed(0)
    module = Attention(heads=heads[0], kv_heads=heads[1], window=window, position=RoPE()).build(32).double()
    assert isinstance(module, AttentionModule)
    time = 512
    segments = lengths_to_segments([100, 12, 100, 100, 100, 100], [60, 200, 52, 100, 50, 50]) if packed else None
    x = torch.randn(2, time, 32, dtype=torch.float64)
    assert mask_of(Placement(segments=segments).resolve(2, time, CPU), None, True, window).pieces()
    assert torch.allclose(outputs(module, x, segments, False), outputs(module, x, segments, True), atol=1e-10)


def test_relative_positions_stay_with_the_mask() -> None:
    torch.manual_seed(0)
    module = Attention(heads=4, position=ALiBi()).build(32).double()
    assert isinstance(module, AttentionModule)
    segments = lengths_to_segments([100] * 6)
    x = torch.randn(1, 600, 32, dtype=torch.float64)
    together = module(x, Placement(segments=segments).resolve(1, 600, CPU))
    for start in range(0, 600, 100):
        alone = module(x[:, start : start + 100], Placement().resolve(1, 100, CPU))
        assert torch.allclose(together[:, start : start + 100], alone, atol=1e-12)


def test_a_window_fills_its_cache_as_before() -> None:
    torch.manual_seed(0)
    module = Attention(heads=2, window=8, position=RoPE()).build(16).double()
    x = torch.randn(1, 300, 16, dtype=torch.float64)
    whole = module(x, Placement().resolve(1, 300, CPU))
    from paperworks.nn import Cache

    cache = Cache([module.new_cache(1, 300, torch.float64, CPU)], 300)
    first = module(x[:, :290], Placement(cache=cache).resolve(1, 290, CPU).at(cache.layers[0]))
    rest = [
        module(x[:, t : t + 1], Placement(cache=cache).resolve(1, 1, CPU).at(cache.layers[0])) for t in range(290, 300)
    ]
    assert torch.allclose(torch.cat([first, *rest], 1), whole, atol=1e-12)
