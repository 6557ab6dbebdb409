import pytest
import torch

from paperworks import interpret
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import Patching, Site
from paperworks.interpret.circuits.path_patching import all_heads, head_means, minimality, only_heads, path_patch
from tests.interpret.circuits.test_circuits import attention_only
from tests.interpret.circuits.test_patching import CLEAN, CORRUPTED, METRIC
from tests.interpret.lenses.test_logit_lens import gpt2_like, llama_like


@pytest.mark.parametrize("make", [llama_like, gpt2_like, lambda: attention_only().float()])
def test_frozen_paths_are_the_edges_of_the_graph(make):
    """An independent way to the same number: switch the edges off in the rewritten residual stream."""
    model = make()
    graph = EdgeGraph(model)
    outputs = graph.outputs(CORRUPTED)
    last = len(model.blocks) - 1
    for sender, receiver in (((0, 1), f"{last}.1.k"), ((0, 3), f"{last}.2.q"), ((0, 2), "logits"), ((0, 0), "1.0.v")):
        found = path_patch(model, CLEAN, CORRUPTED, [sender], [receiver], METRIC, feedforward="frozen")
        edge = graph.edges(f"{sender[0]}.{sender[1]}->{receiver}")
        with torch.no_grad():
            expected = METRIC(graph.run(CLEAN, graph.possible & ~edge, outputs)).mean().item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_recomputed_feedforward_layers_pass_the_change_on():
    model = llama_like()
    found = path_patch(model, CLEAN, CORRUPTED, [(0, 1)], ["1.1.k"], METRIC)
    frozen = path_patch(model, CLEAN, CORRUPTED, [(0, 1)], ["1.1.k"], METRIC, feedforward="frozen")
    assert abs(found - frozen) > 1e-5
    # by hand: the feed-forward layer of block 0 sees the corrupted head, and 1.1.k sees both
    with interpret.record(model, ["blocks.0.mixer.heads"]) as there, torch.no_grad():
        model(CORRUPTED)

    def corrupt(heads):
        new = heads.clone()
        new[:, :, 1] = there["blocks.0.mixer.heads"][:, :, 1]
        return new

    with (
        interpret.edit(model, {"blocks.0.mixer.heads": corrupt}),
        interpret.record(model, "blocks.1.mixer.key") as seen,
        torch.no_grad(),
    ):
        model(CLEAN)

    def put(keys):
        new = keys.clone()
        new[..., 4:8] = seen["blocks.1.mixer.key"][..., 4:8]
        return new

    with interpret.edit(model, {"blocks.1.mixer.key": put}), torch.no_grad():
        assert found == pytest.approx(METRIC(model(CLEAN)).mean().item(), abs=1e-5)


def test_all_senders_at_once_are_activation_patching():
    model = attention_only().float()
    found = path_patch(model, CLEAN, CORRUPTED, all_heads(model), ["logits"], METRIC)
    patching = Patching(model, CLEAN, METRIC, CORRUPTED, direction="noise")
    expected = patching.score([Site(f"blocks.{layer}.mixer.heads") for layer in range(2)])
    assert found == pytest.approx(expected, abs=1e-5)


def test_identical_prompts_change_nothing():
    model = llama_like()
    with torch.no_grad():
        expected = METRIC(model(CLEAN)).double().mean().item()
    found = path_patch(model, CLEAN, CLEAN, [(0, 1), (1, 2)], ["2.0.q", "logits"], METRIC)
    assert found == pytest.approx(expected, abs=1e-6)


def test_means_are_taken_group_by_group():
    model = llama_like()
    groups = torch.tensor([0, 1, 0])
    means = head_means(model, CLEAN, groups)["blocks.1.mixer.heads"]
    with interpret.record(model, "blocks.1.mixer.heads") as seen, torch.no_grad():
        model(CLEAN)
    heads = seen["blocks.1.mixer.heads"]
    assert torch.allclose(means[0], (heads[0] + heads[2]) / 2, atol=1e-6)
    assert torch.allclose(means[1], heads[1], atol=1e-6)


def test_knocking_out_nothing_is_the_model_and_everything_else_is_its_mean():
    model = llama_like()
    groups = torch.tensor([0, 0, 0])
    means = head_means(model, CORRUPTED, groups)
    with torch.no_grad():
        plain = model(CLEAN)
        with only_heads(model, all_heads(model), means, groups):
            assert torch.equal(model(CLEAN), plain)
        with (
            only_heads(model, [(1, 2)], means, groups),
            interpret.record(model, "blocks.{0,1}.mixer.heads") as seen,
        ):
            model(CLEAN)
    assert torch.equal(seen["blocks.0.mixer.heads"], means["blocks.0.mixer.heads"].expand(3, -1, -1, -1))
    kept = seen["blocks.1.mixer.heads"]
    assert torch.equal(kept[:, :, 3], means["blocks.1.mixer.heads"][:, :, 3].expand(3, -1, -1))
    assert not torch.equal(kept[:, :, 2], means["blocks.1.mixer.heads"][:, :, 2].expand(3, -1, -1))


def test_minimality_is_what_each_head_is_worth():
    worth = {(0, 1): 2.0, (1, 0): 0.5}
    found = minimality(lambda heads: sum(worth[head] for head in heads), list(worth))
    assert found == worth


def test_wrong_input_is_refused_with_what_would_be_right():
    model = llama_like()
    for arguments, message in (
        (([(3, 0)], ["logits"]), r"head \(3, 0\): the model has heads \(0, 0\) to \(2, 3\)"),
        (([(0, 0)], ["1.0"]), "such as '2.1.q', or 'logits'"),
        (([(0, 0)], ["1.2.k"]), "has 2 of these, 0 to 1"),
        (([(0, 0)], ["7.0.q"]), "blocks 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            path_patch(model, CLEAN, CORRUPTED, *arguments, METRIC)
    with pytest.raises(ValueError, match="did you mean 'frozen'"):
        path_patch(model, CLEAN, CORRUPTED, [(0, 0)], ["logits"], METRIC, feedforward="froze")
    with pytest.raises(ValueError, match="must have the same shape"):
        path_patch(model, CLEAN, CORRUPTED[:, :5], [(0, 0)], ["logits"], METRIC)
    with pytest.raises(ValueError, match="one label a row"):
        head_means(model, CLEAN, torch.tensor([0]))
    with pytest.raises(ValueError, match="group 1 has no rows"):
        head_means(model, CLEAN, torch.tensor([0, 2, 0]))
