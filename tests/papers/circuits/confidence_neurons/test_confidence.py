from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from paperworks.interpret import record
from paperworks.models.presets.families import gpt2, llama
from paperworks.papers.circuits.confidence_neurons import confidence

DIM, VOCAB = 12, 40


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(weight, positions=9, seed=1):
    read = confidence.Readout(weight, 1e-5)
    targets = torch.randint(len(weight), (positions,), generator=torch.Generator().manual_seed(seed))
    log_p = confidence.log_unigram(torch.arange(len(weight)) ** 2)
    stream = draw(positions, weight.shape[1], seed=seed)
    return confidence.Ablations(read, stream, targets, log_p), read, stream, targets, log_p


@pytest.fixture(params=["llama", "gpt2", "transformers llama", "transformers gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        made = llama(32, 2, 4, 64, vocab_size=50, context=16).build()
    elif request.param == "gpt2":
        made = replace(gpt2(32, 2, 4), vocab_size=50).build()
    else:
        import transformers

        sizes = {"vocab_size": 50, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
        if request.param.endswith("llama"):
            made = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes
                )
            )
        else:
            made = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **sizes)
            )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


@torch.no_grad()
def test_the_readout_gives_the_models_own_logits(model):
    from paperworks.interpret.residual import residual_stream

    tokens = torch.randint(50, (2, 7))
    last = residual_stream(model).blocks[-1]
    with record(model, [last]) as seen:
        output = model(tokens)
    logits = getattr(output, "logits", output)
    # float32, sums of 32 products in another order
    torch.testing.assert_close(confidence.readout(model).logits(seen[last]), logits, atol=2e-5, rtol=1e-4)


def test_logit_variance_follows_its_formula():
    weight, writes = draw(VOCAB, DIM), draw(3, DIM, seed=1)
    for neuron, write in enumerate(writes):
        cosines = torch.stack([write @ row / (write.norm() * row.norm()) for row in weight])
        expected = (cosines - cosines.mean()).square().mean().item()
        assert confidence.logit_variance(writes, weight)[neuron].item() == pytest.approx(expected, rel=1e-12)


def test_the_spectrum_is_the_singular_value_decomposition():
    weight = draw(VOCAB, DIM)
    _, strengths, directions = torch.linalg.svd(weight, full_matrices=False)
    found = confidence.spectrum(weight)
    torch.testing.assert_close(found.strengths, strengths, atol=1e-10, rtol=0)
    assert ((found.directions * directions).sum(1).abs() - 1).abs().max() < 1e-10
    null = found.null_space(3)
    writes = draw(4, DIM, seed=2)
    expected = [(directions[-3:] @ write).norm().item() / write.norm().item() for write in writes]
    assert confidence.null_share(writes, null).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_planted_entropy_neuron_acts_through_the_norm_alone():
    null = confidence.spectrum(draw(VOCAB, DIM)).null_space(2)
    weight = draw(VOCAB, DIM)
    weight = weight - weight @ null.mT @ null
    ablate, read, stream, _, _ = setting(weight)
    write = 3 * null[0]
    assert confidence.logit_variance(write[None], weight).item() < 1e-28
    moved = stream + 0.7 * write
    factor = read.scale(moved) / read.scale(stream)
    torch.testing.assert_close(read.logits(moved, read.scale(stream)), read.logits(stream), atol=1e-12, rtol=0)
    torch.testing.assert_close(read.logits(moved), factor * read.logits(stream), atol=1e-12, rtol=0)
    assert torch.equal(factor[:, 0] < 1, moved.norm(dim=1) > stream.norm(dim=1))
    effect = ablate(write, draw(9, seed=3))
    assert effect.through_norm == pytest.approx(1, abs=1e-10)
    assert effect.entropy.abs().min() > 0


def test_a_planted_frequency_neuron_is_found_by_its_weights_and_by_its_effect():
    weight = draw(VOCAB, VOCAB)  # square, so that v_freq can be reached exactly
    _, read, stream, targets, log_p = setting(weight)
    write = functional.normalize(torch.linalg.pinv(weight) @ (log_p - log_p.mean()), dim=0)
    writes = torch.cat([draw(20, VOCAB, seed=4), write[None]])
    cosines = confidence.frequency_cosine(writes, weight, log_p)
    assert cosines.abs().argmax() == 20
    assert cosines[20].item() == pytest.approx(1, abs=1e-9)
    # Off what the stream holds already and small, the write leaves the norm as it is, to second order.
    ablate = confidence.Ablations(read, stream - (stream @ write)[:, None] * write, targets, log_p)
    small = 1e-4 * draw(9, seed=3)
    assert ablate(write, small).through_frequency > 0.99
    assert ablate(writes[0], small).through_frequency < 0.2


def test_an_ablation_is_the_difference_of_two_runs():
    weight = draw(VOCAB, DIM)
    ablate, _, stream, targets, log_p = setting(weight)
    write, activation = draw(DIM, seed=5), draw(9, seed=6)
    effect = ablate(write, activation)
    direction = (log_p - log_p.mean()) / (log_p - log_p.mean()).norm()
    for position in range(9):
        x = stream[position]
        ablated = x + (activation.mean() - activation[position]) * write
        norm = (x.square().mean() + 1e-5).sqrt()
        clean = weight @ x / norm
        total = weight @ ablated / (ablated.square().mean() + 1e-5).sqrt()
        held = total - (total @ direction) * direction + (clean @ direction) * direction

        def loss(logits, position=position):
            return functional.cross_entropy(logits, targets[position]).item()

        def entropy(logits):
            return torch.distributions.Categorical(logits=logits).entropy().item()

        def divergence(logits):
            return functional.kl_div(log_p, logits.log_softmax(0), log_target=True, reduction="sum").item()

        assert effect.loss[position].item() == pytest.approx(loss(total) - loss(clean), abs=1e-10)
        frozen = loss(weight @ ablated / norm) - loss(clean)
        assert effect.loss_frozen_scale[position].item() == pytest.approx(frozen, abs=1e-10)
        assert effect.loss_held_frequency[position].item() == pytest.approx(loss(held) - loss(clean), abs=1e-10)
        assert effect.entropy[position].item() == pytest.approx(entropy(total) - entropy(clean), abs=1e-10)
        assert effect.divergence[position].item() == pytest.approx(divergence(total) - divergence(clean), abs=1e-10)
    share = 1 - effect.loss_frozen_scale.abs().mean() / effect.loss.abs().mean()
    assert effect.through_norm == pytest.approx(share.item())


@torch.no_grad()
def test_ablating_with_the_readout_is_ablating_in_the_model():
    from paperworks.interpret import edit

    torch.manual_seed(0)
    model = llama(32, 2, 4, 64, vocab_size=50, context=16).build().double()
    tokens = torch.randint(50, (1, 9))
    with record(model, ["blocks.1", "blocks.1.feedforward.hidden"]) as seen:
        clean = model(tokens)
    hidden = seen["blocks.1.feedforward.hidden"][0, :-1]

    def mean_ablated(x):
        x = x.clone()
        x[..., 5] = hidden[:, 5].mean()
        return x

    with edit(model, {"blocks.1.feedforward.hidden": mean_ablated}):
        changed = model(tokens)
    losses = [functional.cross_entropy(each[0, :-1], tokens[0, 1:], reduction="none") for each in (clean, changed)]
    log_p = confidence.log_unigram(torch.ones(50))
    ablate = confidence.Ablations(confidence.readout(model), seen["blocks.1"][0, :-1], tokens[0, 1:], log_p)
    effect = ablate(model.blocks[1].feedforward.down.weight[:, 5], hidden[:, 5])
    torch.testing.assert_close(effect.loss, losses[1] - losses[0], atol=1e-12, rtol=0)


def test_unigram_probabilities_add_up_to_one_and_none_is_zero():
    p = confidence.log_unigram(torch.tensor([0, 3, 5])).exp()
    assert p.tolist() == pytest.approx([1 / 11, 4 / 11, 6 / 11])


def test_bad_input_is_refused_with_what_would_be_right():
    weight = draw(VOCAB, DIM)
    ablate, read, stream, targets, log_p = setting(weight)
    with pytest.raises(ValueError, match="pass its weight transposed"):
        confidence.logit_variance(draw(DIM, 3), weight)
    with pytest.raises(ValueError, match="between 1 and the stream's 12 dimensions, got 13"):
        confidence.spectrum(weight).null_space(13)
    with pytest.raises(ValueError, match="one number >= 0"):
        confidence.log_unigram(torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match="one target a position"):
        confidence.Ablations(read, stream, targets[1:], log_p)
    with pytest.raises(ValueError, match="each of 40 tokens, got 39"):
        confidence.Ablations(read, stream, targets, log_p[1:])
    with pytest.raises(ValueError, match="a write of 12 and 9 activations"):
        ablate(draw(DIM), draw(8))
    with pytest.raises(ValueError, match="changes no loss"):
        _ = ablate(draw(DIM), torch.ones(9, dtype=torch.float64)).through_norm
    capped = llama(32, 1, 4, 64, vocab_size=50, context=16).build()
    capped.spec = replace(capped.spec, logit_soft_cap=30.0)
    with pytest.raises(ValueError, match=r"soft-capped at 30\.0"):
        confidence.readout(capped)
