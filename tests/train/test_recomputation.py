import copy

import pytest
import torch
import transformers
from torch import nn

import paperworks as pw
from paperworks import adapt, compress, train
from paperworks.interpret import record
from paperworks.models.presets.families import llama
from paperworks.train.recomputation import recompute

TOKENS = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return llama(32, 3, 4, 48, vocab_size=64).build().train()


def gradients(net, seed=0):
    torch.manual_seed(seed)
    out = net(TOKENS)
    (out if torch.is_tensor(out) else out.logits).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def kept_bytes(net):
    """What autograd saves in one forward pass; views of one storage count once."""
    storages = {}
    own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(TOKENS)
    return sum(storages.values())


def test_outputs_gradients_and_names_are_the_same_bits():
    plain, lean = model(), recompute(model())
    assert list(plain.state_dict()) == list(lean.state_dict())
    assert [path for path, _ in plain.named_modules()] == [path for path, _ in lean.named_modules()]
    assert torch.equal(plain(TOKENS), lean(TOKENS))
    wanted, found = gradients(plain), gradients(lean)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_dropout_draws_the_same_mask_in_both_passes():
    nets = [model(), recompute(model())]
    for net in nets:
        for block in net.blocks:
            block.feedforward.up = nn.Sequential(block.feedforward.up, nn.Dropout(0.5))
    wanted, found = (gradients(net, seed=3) for net in nets)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    other = gradients(nets[0], seed=4)
    assert any(not torch.equal(wanted[name], other[name]) for name in wanted)


def test_less_is_kept_for_the_backward_pass():
    # a block's input is a twentieth of what a block of this shape keeps
    assert kept_bytes(recompute(model())) < 0.5 * kept_bytes(model())


def test_it_works_under_adapters_on_compressed_layers_and_in_copies():
    net = recompute(compress.apply(model(), compress.NF4(block=32)))
    assert recompute(net) is net
    adapt.apply(net, adapt.LoRA(rank=2), "attention")
    other = copy.deepcopy(net)
    train.fit(net, train.next_token_loss, [TOKENS] * 2, train.Settings(steps=2, save_every=None, progress=False))
    plain = adapt.apply(compress.apply(model(), compress.NF4(block=32)), adapt.LoRA(rank=2), "attention")
    plain.load_state_dict(other.state_dict())
    train.fit(plain, train.next_token_loss, [TOKENS] * 2, train.Settings(steps=2, save_every=None, progress=False))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(net.blocks[0].mixer.query.delta.up, other.blocks[0].mixer.query.delta.up)


def test_decoding_and_recording_are_as_before():
    plain, lean = model().eval(), recompute(model()).eval()
    ids = TOKENS[:1]
    assert torch.equal(
        *(pw.generate(net, ids, max_new_tokens=5, temperature=0.0) for net in (plain, lean))  # with a cache
    )
    with torch.no_grad(), record(lean, ["blocks.1"]) as seen:
        lean(ids)
    assert seen["blocks.1"].shape == (1, 10, 32)


def test_other_libraries_models_and_nested_targets():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = transformers.LlamaForCausalLM(config).train()
    lean = recompute(copy.deepcopy(theirs), ["model.layers.*"])  # `*` crosses dots: the layers alone are taken
    assert type(lean.model.layers[0]) is not type(theirs.model.layers[0])
    assert type(lean.model.layers[0].mlp) is type(theirs.model.layers[0].mlp)
    wanted, found = gradients(theirs), gradients(lean)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"blockz"):
        recompute(model(), "blockz.*")
