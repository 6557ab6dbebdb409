from dataclasses import replace

import pytest
import torch

from paperworks.interpret import record
from paperworks.interpret.lenses.prompt_view import LIKELIEST, NEURONS, prompt_view
from paperworks.models.presets.families import gpt2, llama

TOKENS = torch.randint(60, (7,), generator=torch.Generator().manual_seed(0))


def model(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return replace(gpt2(32, 2, 4), vocab_size=60, context=16).build().eval()
    return llama(32, 2, 4, 48, kv_heads=2, vocab_size=60).build().eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_effects_add_up_to_the_answers_logit_above_the_mean(kind):
    net = model(kind)
    view = prompt_view(net, TOKENS)
    with torch.no_grad():
        logits = net(TOKENS[None])[0]
    best, answer = logits.max(-1)
    assert torch.equal(view.lens_tokens[-1, :, 0], answer)
    # sums of some twenty float32 parts
    torch.testing.assert_close(view.effects.sum(0), best - logits.mean(-1), rtol=1e-4, atol=1e-5)
    assert len(view.components) == len(view.effects)


def test_the_last_reading_is_the_prediction_and_the_first_the_embedding_alone():
    net = model()
    view = prompt_view(net, TOKENS)
    with torch.no_grad():
        wanted = net(TOKENS[None])[0].softmax(-1).topk(LIKELIEST).values
        first = net.logits(net.norm(net.embedding(TOKENS[None])))[0].softmax(-1).topk(LIKELIEST)
    torch.testing.assert_close(view.lens_probabilities[-1], wanted)
    assert torch.equal(view.lens_tokens[0], first.indices)
    assert view.lens_tokens.shape == (3, 7, LIKELIEST)


def test_the_answer_has_rank_1_in_the_end_and_its_own_probability_before():
    net = model()
    view = prompt_view(net, TOKENS)
    with torch.no_grad():
        first = net.logits(net.norm(net.embedding(TOKENS[None])))[0].softmax(-1)
    answers = view.lens_tokens[-1, :, 0]
    assert view.answer_ranks.shape == view.answer_probabilities.shape == (3, 7)
    assert (view.answer_ranks[-1] == 1).all()
    torch.testing.assert_close(view.answer_probabilities[-1], view.lens_probabilities[-1, :, 0])
    for time, answer in enumerate(answers.tolist()):
        order = first[time].argsort(descending=True).tolist()
        assert view.answer_ranks[0, time] == 1 + order.index(answer)
        assert view.answer_probabilities[0, time] == pytest.approx(float(first[time, answer]), rel=1e-5)


def test_patterns_are_those_of_the_heads():
    net = model()
    view = prompt_view(net, TOKENS)
    with torch.no_grad(), record(net, "blocks.*.mixer.pattern") as seen:
        net(TOKENS[None])
    assert list(view.patterns) == ["blocks.0.mixer", "blocks.1.mixer"]
    for path, found in view.patterns.items():
        pattern = seen[f"{path}.pattern"][0]
        wanted = pattern / pattern.amax(-1, keepdim=True)
        assert (found / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-6  # half of a step of 255ths


def test_a_neurons_effect_is_what_its_removal_takes_away():
    net = model()
    view = prompt_view(net, TOKENS)
    assert all(len(some) == NEURONS for some in view.neurons)
    time = 4
    last = [neuron for neuron in view.neurons[time] if neuron.path == "blocks.1.feedforward"]
    with torch.no_grad(), record(net, ["blocks.1", "blocks.1.feedforward.hidden"]) as seen:
        logits = net(TOKENS[None])[0, time]
    answer, stream = int(logits.argmax()), seen["blocks.1"][0, time]
    scale = torch.rsqrt(stream.square().mean() + net.norm.eps) * net.norm.weight
    direction = net.unembedding.weight[answer] - net.unembedding.weight.mean(0)
    assert last
    for neuron in last:
        activation = seen["blocks.1.feedforward.hidden"][0, time, neuron.unit]
        assert neuron.activation == pytest.approx(float(activation))
        column = net.blocks[1].feedforward.down.weight[:, neuron.unit]
        effect = float((activation * column * scale * direction).sum().detach())
        assert neuron.effect == pytest.approx(effect, rel=1e-4, abs=1e-6)
    ordered = [abs(neuron.effect) for neuron in view.neurons[time]]
    assert ordered == sorted(ordered, reverse=True)


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(ValueError, match=r"one prompt .* got \(1, 7\)"):
        prompt_view(model(), TOKENS[None])
    with pytest.raises(ValueError, match="one prompt"):
        prompt_view(model(), TOKENS[:0])
    with pytest.raises(ValueError, match="do not know where the residual stream"):
        prompt_view(torch.nn.Sequential(torch.nn.Linear(3, 3)), TOKENS)
