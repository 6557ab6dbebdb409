import pytest
import torch

from paperworks.interpret.circuits.attribution_patching import attribute_edges, attribute_nodes
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import Patching, Site, kl_divergence, logit_difference
from paperworks.models import Block
from paperworks.nn import Attention, NoNorm
from tests.interpret.circuits.test_patching import AGAINST, ANSWER, CLEAN, CORRUPTED, METRIC
from tests.interpret.lenses.test_logit_lens import gpt2_like, llama_like
from tests.parity.families import oracle


def without_norms():
    return llama_like(block=Block(norm=NoNorm(), mixer=Attention(heads=2)), norm=None)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_attribution_equals_patching_where_the_metric_is_linear(direction):
    model = without_norms()
    found = attribute_nodes(model, CLEAN, CORRUPTED, METRIC, "blocks.2*", direction=direction)
    patching = Patching(model, CLEAN, METRIC, CORRUPTED, direction=direction)
    base = patching.corrupted_score if direction == "denoise" else patching.clean_score
    for position in range(7):  # what the last block writes goes straight to the logits
        exact = patching.score([Site("blocks.2", position)]) - base
        assert found["blocks.2"][:, position].mean().item() == pytest.approx(exact, abs=1e-5)
        for head in range(2):
            exact = patching.score([Site("blocks.2.mixer.heads", position, head)]) - base
            assert found["blocks.2.mixer.heads"][:, position, head].mean().item() == pytest.approx(exact, abs=1e-5)


def test_attribution_is_the_slope_of_patching_a_small_share():
    """Against finite differences through edits, in float64."""
    from paperworks import interpret

    model = gpt2_like().double()
    path = "blocks.1.mixer.heads"
    found = attribute_nodes(model, CLEAN, CORRUPTED, METRIC, path)[path].mean(0)
    with interpret.record(model, path) as clean, torch.no_grad():
        model(CLEAN)
    for position, head in ((2, 0), (5, 3)):
        scores = []
        for share in (-1e-4, 1e-4):

            def blend(heads, share=share, position=position, head=head):
                new = heads.clone()
                new[:, position, head] += share * (clean[path][:, position, head] - heads[:, position, head])
                return new

            with interpret.edit(model, {path: blend}), torch.no_grad():
                scores.append(METRIC(model(CORRUPTED)).mean())
        slope = ((scores[1] - scores[0]) / 2e-4).item()
        assert found[position, head].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_integrated_attributions_of_the_embedding_add_up_to_the_difference():
    model = llama_like()
    patching = Patching(model, CLEAN, METRIC, CORRUPTED)
    gap = patching.clean_score - patching.corrupted_score
    whole = {
        steps: attribute_nodes(model, CLEAN, CORRUPTED, METRIC, "embedding", steps=steps)["embedding"]
        .sum(1)
        .mean()
        .item()
        for steps in (1, 50)
    }
    assert whole[50] == pytest.approx(gap, rel=0.01)
    assert abs(whole[1] - gap) > abs(whole[50] - gap)


def test_two_forward_passes_and_one_backward():
    model = llama_like()
    forward, backward = [], []
    model.register_forward_hook(lambda *given: forward.append(1))
    model.blocks[1].register_full_backward_hook(lambda *given: backward.append(1))
    attribute_nodes(model, CLEAN, CORRUPTED, METRIC, ["blocks.*.mixer.heads", "blocks.*"])
    assert (len(forward), len(backward)) == (2, 1)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_patterns_are_attributed_query_by_query():
    model = without_norms()
    path = "blocks.2.mixer.pattern"
    found = attribute_nodes(model, CLEAN, CORRUPTED, METRIC, path)[path]
    assert found.shape == (3, 2, 7)
    patching = Patching(model, CLEAN, METRIC, CORRUPTED)
    exact = patching.score([Site(path, 6, 1)]) - patching.corrupted_score  # linear: nothing but the logits comes after
    assert found[:, 1, 6].mean().item() == pytest.approx(exact, abs=1e-5)
    assert not found[:, :, :6].any()  # only the last position is read


def test_frozen_models_and_other_libraries_are_attributed_too():
    theirs = oracle("llama2").requires_grad_(False)
    metric = lambda output: METRIC(output.logits)  # noqa: E731
    found = attribute_nodes(theirs, CLEAN, CORRUPTED, metric, "model.layers.2", start="model.embed_tokens")
    assert found["model.layers.2"].shape == (3, 7)
    assert found["model.layers.2"][:, -1].abs().min() > 0


@pytest.mark.parametrize("make", [without_norms, llama_like, gpt2_like])
@pytest.mark.parametrize("at", ["clean", "corrupted"])
def test_edge_scores_are_slopes_of_single_edges(make, at):
    """Against a naive loop: change one receiver's input by a small share of one sender's difference, in float64."""
    model = make().double()
    graph = EdgeGraph(model)
    scores = attribute_edges(graph, CLEAN, CORRUPTED, METRIC, at=at)
    assert not scores[~graph.possible].any()
    here, there = graph.outputs(CLEAN), graph.outputs(CORRUPTED)
    tokens, other = (CLEAN, there) if at == "clean" else (CORRUPTED, here)
    own = here if at == "clean" else there
    sign = -1 if at == "clean" else 1
    for name in ("embed->1.0.k", "0.1->2.1.v", "1.0->logits", "embed->0.0.q"):
        edge = graph.edges(name)
        step = 1e-4
        results = []
        for share in (-step, step):  # the other run's output, so close to this one's that only the slope is left
            near = own + share * (other - own)
            with torch.no_grad():
                results.append(METRIC(graph.run(tokens, graph.possible & ~edge, near)).mean())
        slope = ((results[1] - results[0]) / (2 * step)).item()
        assert (sign * scores[edge]).item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_a_metric_at_its_minimum_is_refused():
    model = llama_like().double()
    with torch.no_grad():
        reference = model(CORRUPTED)
    constant = lambda logits: 0 * logits[:, -1, 0]  # noqa: E731
    for metric in (constant,):
        with pytest.raises(ValueError, match="zero everywhere: is it a KL"):
            attribute_nodes(model, CLEAN, CORRUPTED, metric, "blocks.0")
        with pytest.raises(ValueError, match="zero everywhere: is it a KL"):
            attribute_edges(EdgeGraph(model), CLEAN, CORRUPTED, metric)
    # KL at its own run is zero up to rounding: nothing to rank by
    at_minimum = attribute_nodes(model, CLEAN, CORRUPTED, kl_divergence(reference), "blocks.0")["blocks.0"]
    elsewhere = attribute_nodes(model, CLEAN, CORRUPTED, kl_divergence(reference), "blocks.0", direction="noise")[
        "blocks.0"
    ]
    assert at_minimum.abs().max() < 1e-9 * elsewhere.abs().max()


def test_wrong_input_is_refused_with_what_would_be_right():
    model = llama_like()
    with pytest.raises(ValueError, match="must have the same shape"):
        attribute_nodes(model, CLEAN, CORRUPTED[:, :5], METRIC, "blocks.0")
    with pytest.raises(ValueError, match="unknown direction"):
        attribute_nodes(model, CLEAN, CORRUPTED, METRIC, "blocks.0", direction="both")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        attribute_nodes(model, CLEAN, CORRUPTED, METRIC, "blocks.0", steps=0)
    with pytest.raises(ValueError, match="unknown run 'corrupt'; did you mean 'corrupted'"):
        attribute_edges(EdgeGraph(model), CLEAN, CORRUPTED, METRIC, at="corrupt")
    with pytest.raises(ValueError, match="must have the same shape"):
        attribute_edges(EdgeGraph(model), CLEAN, CORRUPTED[:, :5], logit_difference(ANSWER, AGAINST))
