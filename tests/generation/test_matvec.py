import pytest
import torch

from paperworks.generation.matvec import fast_linears, product
from paperworks.models import Block
from paperworks.nn import Attention, GatedMLP, RMSNorm

from .small import VOCAB, build


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_products_by_blocks_of_rows_equal_the_plain_product(rows, blocks):
    x, weight = torch.randn(rows, 12, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    assert (product(x, weight, blocks) - x @ weight.T).abs().max() < 1e-12


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_fast_products_equal_torch_and_leave_no_trace():
    model = build(block=Block(norm=RMSNorm(), mixer=Attention(heads=2, bias=True), feedforward=GatedMLP(hidden=24)))
    tokens = torch.randint(0, VOCAB, (2, 1))
    with torch.no_grad():
        before = model(tokens)
        with fast_linears(model):
            assert "forward" in vars(model.unembedding)
            assert (model(tokens) - before).abs().max() < 1e-5
            model.blocks[0].mixer.query.weight.data = model.blocks[0].mixer.query.weight * 2  # storage swapped
            assert not torch.allclose(model(tokens), before)
        doubled = model(tokens)
        with fast_linears(model):
            assert (model(tokens) - doubled).abs().max() < 1e-5
    assert "forward" not in vars(model.unembedding)
    with fast_linears(model), torch.enable_grad():
        model(tokens).sum().backward()  # gradients take torch's path
    assert model.unembedding.weight.grad is not None
