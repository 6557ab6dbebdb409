import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paperworks import adapt, compress
from paperworks.interpret.weights.folding import (
    centre_unembedding,
    centre_writes,
    fold_norms,
    fold_value_biases,
    norm_readers,
)
from paperworks.models import Parallel, preset
from paperworks.nn import Attention, RMSNorm
from tests.interpret.lenses.test_logit_lens import TOKENS, gpt2_like, llama_like
from tests.parity.families import oracle


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [llama_like, lambda: llama_like(tied=True), gpt2_like], ids=["rms", "tied", "layer"])
def test_folded_norms_compute_the_same_with_gain_one(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    folded = fold_norms(model)
    with torch.no_grad():
        assert (folded(TOKENS) - model(TOKENS)).abs().max() < 1e-4
    for path in norm_readers(model):
        norm = folded.get_submodule(path)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert getattr(norm, "bias", None) is None or not norm.bias.any()
    assert unchanged(model, before)
    assert folded.unembedding.weight is not folded.embedding.weight
    assert not folded.spec.tied
    assert torch.equal(folded.embedding.weight, model.embedding.weight)


def test_a_gain_stored_as_its_distance_from_one_is_folded_too():
    from dataclasses import replace

    spec = llama_like().spec
    norm = RMSNorm(offset=True)
    model = llama_like(block=replace(spec.block, norm=norm), norm=norm)
    folded = fold_norms(model)
    with torch.no_grad():
        assert (folded(TOKENS) - model(TOKENS)).abs().max() < 1e-4
    assert not folded.norm.weight.any()


def test_centred_writes_keep_the_function_and_every_write_has_mean_zero():
    from paperworks.interpret.residual import decompose

    model = gpt2_like()
    before = copy.deepcopy(model.state_dict())
    centred = centre_writes(model)
    with torch.no_grad():
        assert (centred(TOKENS) - model(TOKENS)).abs().max() < 1e-4
    assert decompose(centred, TOKENS, heads=True).parts.mean(-1).abs().max() < 1e-6
    assert decompose(model, TOKENS, heads=True).parts.mean(-1).abs().max() > 1e-2
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="only where every norm is a LayerNorm"):
        centre_writes(llama_like())


def test_a_centred_unembedding_shifts_logits_by_a_constant_at_each_position():
    model = llama_like(tied=True)
    centred = centre_unembedding(model)
    with torch.no_grad():
        shift = centred(TOKENS) - model(TOKENS)
        assert (centred(TOKENS).log_softmax(-1) - model(TOKENS).log_softmax(-1)).abs().max() < 1e-4
        assert centred(TOKENS).mean(-1).abs().max() < 1e-5
    assert shift.abs().max() > 1e-2
    assert (shift - shift[..., :1]).abs().max() < 1e-5


def test_value_biases_move_to_the_output():
    from dataclasses import replace

    spec = llama_like().spec
    shared = llama_like(block=replace(spec.block, mixer=Attention(heads=4, kv_heads=2, bias=True, output_bias=False)))
    for model in (gpt2_like(), shared):
        folded = fold_value_biases(model)
        assert model.blocks[0].mixer.value.bias.abs().max() > 0
        assert not folded.blocks[0].mixer.value.bias.any()
        with torch.no_grad():
            assert (folded(TOKENS) - model(TOKENS)).abs().max() < 1e-4


def test_everything_at_once_still_computes_the_same():
    model = gpt2_like()
    easy = centre_unembedding(centre_writes(fold_value_biases(fold_norms(model))))
    with torch.no_grad():
        assert (easy(TOKENS).log_softmax(-1) - model(TOKENS).log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parity
def test_a_transformers_llama_folds_at_its_own_paths():
    for family in ("llama2", "smollm2"):
        theirs = oracle(family)
        folded = fold_norms(theirs)
        with torch.no_grad():
            expected = theirs(TOKENS).logits
            assert (folded(TOKENS).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        assert torch.equal(folded.model.norm.weight, torch.ones_like(folded.model.norm.weight))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match=r"arranged as Parallel"):
        fold_norms(gpt2_like(Parallel()))
    with pytest.raises(ValueError, match="pass readers="):
        fold_norms(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)))
    pair = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    with torch.no_grad():
        pair[0].weight.uniform_(1, 2)
        pair[0].bias.uniform_(1, 2)
    x = torch.randn(4, 3)
    assert torch.allclose(fold_norms(pair, {"0": ["1"]})(x), pair(x), atol=1e-5)


@pytest.mark.parametrize("change", ["adapted", "compressed"])
def test_weights_that_are_computed_when_asked_for_are_refused(change):
    model = replace(preset("nano"), depth=1).build()
    if change == "adapted":
        adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    else:
        compress.apply(model, compress.Int8(), targets="attention")
    for fold in (fold_norms, centre_unembedding):
        with pytest.raises(ValueError, match="does not hold its weight as it is: merge adapters"):
            fold(model)
