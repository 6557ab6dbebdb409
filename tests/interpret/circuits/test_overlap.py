import itertools
from fractions import Fraction

import pytest
import torch

from paperworks import interpret
from paperworks.interpret.circuits.overlap import attending, chance_overlap, overlap, rows_on, staged_circuit
from paperworks.interpret.circuits.path_patching import all_heads, path_patch
from tests.interpret.circuits.test_circuits import attention_only
from tests.interpret.circuits.test_patching import CLEAN, CORRUPTED, METRIC
from tests.interpret.lenses.test_logit_lens import llama_like

STAGES = {"movers": "logits", "inhibition": "q", "gatherers": "kv"}
HEADS = [(layer, head) for layer in range(2) for head in range(3)]


def test_a_stage_is_path_patching_into_the_heads_of_the_stage_before():
    model = llama_like()
    found = staged_circuit(model, CLEAN, CORRUPTED, METRIC, STAGES, top=2 / 12)
    with torch.no_grad():
        start = METRIC(model(CLEAN)).double().mean().item()

    def effects(receivers, senders):
        def shift(some):
            return path_patch(model, CLEAN, CORRUPTED, some, receivers, METRIC) - start

        return {sender: shift([sender]) / shift(senders) for sender in senders}

    def strongest(by_head):
        return sorted(by_head, key=lambda head: -abs(by_head[head]))[:2]

    logits = effects(["logits"], all_heads(model))
    assert found.effects["movers"] == pytest.approx(logits, rel=1e-6)
    movers = strongest(logits)
    assert found.stages["movers"] == movers
    last = max(layer for layer, _ in movers)
    queries = effects([f"{layer}.{head}.q" for layer, head in movers], [h for h in all_heads(model) if h[0] < last])
    assert found.effects["inhibition"] == pytest.approx(queries, rel=1e-6)
    inhibition = strongest(queries)
    assert found.stages["inhibition"] == inhibition
    last = max(layer for layer, _ in inhibition)
    # Two query heads share each key-value head in this model.
    shared = [f"{layer}.{head // 2}.{part}" for layer, head in inhibition for part in "kv"]
    if last:
        inputs = effects(list(dict.fromkeys(shared)), [h for h in all_heads(model) if h[0] < last])
        assert found.effects["gatherers"] == pytest.approx(inputs, rel=1e-6)
    assert found.heads == sorted({head for stage in found.stages.values() for head in stage})


def test_query_heads_that_share_keys_and_values_name_them_once():
    model = llama_like()
    found = staged_circuit(model, CLEAN, CORRUPTED, METRIC, {"movers": "logits", "gatherers": "kv"}, top=1.0)
    assert found.stages["movers"][:1]
    shared = [f"{layer}.{head}.{part}" for layer in range(3) for head in range(2) for part in "kv"]
    with torch.no_grad():
        start = METRIC(model(CLEAN)).double().mean().item()
    senders = [head for head in all_heads(model) if head[0] < 2]
    whole = path_patch(model, CLEAN, CORRUPTED, senders, shared, METRIC) - start
    one = path_patch(model, CLEAN, CORRUPTED, [(0, 1)], shared, METRIC) - start
    assert found.effects["gatherers"][(0, 1)] == pytest.approx(one / whole, rel=1e-6)


def test_a_threshold_is_a_share_of_the_stage_or_of_the_run():
    model = attention_only().float()
    with torch.no_grad():
        start, end = (METRIC(model(tokens)).double().mean().item() for tokens in (CLEAN, CORRUPTED))
    own = staged_circuit(model, CLEAN, CORRUPTED, METRIC, {"movers": "logits", "before": "qkv"}, over=0.3)
    run = staged_circuit(
        model, CLEAN, CORRUPTED, METRIC, {"movers": "logits", "before": "qkv"}, over=0.3, relative_to="run"
    )
    for circuit in (own, run):
        for name, effects in circuit.effects.items():
            assert set(circuit.stages[name]) == {head for head, effect in effects.items() if abs(effect) > 0.3}
    head = (1, 0)
    changed = path_patch(model, CLEAN, CORRUPTED, [head], ["logits"], METRIC)
    whole = path_patch(model, CLEAN, CORRUPTED, all_heads(model), ["logits"], METRIC)
    assert own.effects["movers"][head] == pytest.approx((changed - start) / (whole - start), rel=1e-6)
    assert run.effects["movers"][head] == pytest.approx((changed - start) / (end - start), rel=1e-6)


def test_a_share_and_a_threshold_go_together():
    model = attention_only().float()
    options = {"stages": {"movers": "logits"}}
    top = staged_circuit(model, CLEAN, CORRUPTED, METRIC, top=0.5, **options).stages["movers"]
    over = staged_circuit(model, CLEAN, CORRUPTED, METRIC, over=0.05, **options).stages["movers"]
    both = staged_circuit(model, CLEAN, CORRUPTED, METRIC, top=0.5, over=0.05, **options).stages["movers"]
    assert set(both) == set(top) & set(over)
    assert len(top) == len(all_heads(model)) / 2


def test_the_order_of_prompts_does_not_matter():
    model = llama_like()
    order = torch.tensor([2, 0, 1])

    def metric(logits):  # the same pair of tokens in every row, so that rows may change places
        return logits[:, -1, 3] - logits[:, -1, 5]

    found = staged_circuit(model, CLEAN, CORRUPTED, metric, STAGES, top=0.25)
    moved = staged_circuit(model, CLEAN[order], CORRUPTED[order], metric, STAGES, top=0.25)
    assert moved.stages == found.stages


def test_no_strong_head_ends_the_search():
    found = staged_circuit(llama_like(), CLEAN, CORRUPTED, METRIC, STAGES, over=1e6)
    assert found.stages == {"movers": [], "inhibition": [], "gatherers": []}
    assert found.effects["inhibition"] == {}
    assert found.heads == []


def test_equal_sets_overlap_by_one_and_disjoint_ones_by_nothing():
    same = overlap([(0, 1), (1, 2)], [(1, 2), (0, 1)])
    assert (same.shared, same.jaccard, same.reused) == (2, 1.0, 1.0)
    apart = overlap([(0, 1)], [(1, 2)])
    assert (apart.shared, apart.jaccard, apart.reused) == (0, 0.0, 0.0)
    partly = overlap([(0, 0), (0, 1), (0, 2)], [(0, 2), (0, 3)])
    assert (partly.shared, partly.jaccard, partly.reused) == (1, 0.25, 0.5)


@pytest.mark.parametrize("measure", ["shared", "jaccard", "reused"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_chance_is_the_average_over_all_sets(measure, by_layer):
    first, second = [(0, 0), (0, 1), (1, 2)], [(0, 1), (1, 1), (1, 2)]
    sets = [
        some
        for some in itertools.combinations(HEADS, len(second))
        if not by_layer or sum(layer for layer, _ in some) == 2
    ]
    values = [getattr(overlap(first, some), measure) for some in sets]
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    observed = getattr(overlap(first, second), measure)
    found = chance_overlap(first, second, HEADS, measure=measure, by_layer=by_layer)
    assert found.observed == observed
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx(std, rel=1e-12)
    reached = sum(value >= observed for value in values)
    assert found.p_value == pytest.approx(float(Fraction(reached, len(values))), rel=1e-12)
    assert found.deviations == pytest.approx((observed - mean) / std, rel=1e-9)


def test_chance_without_a_choice_deviates_by_nothing():
    found = chance_overlap(HEADS, HEADS, HEADS)
    assert (found.observed, found.mean, found.std, found.p_value, found.deviations) == (1.0, 1.0, 0.0, 1.0, 0.0)


def test_rows_look_at_their_places_alone():
    rows = rows_on(torch.tensor([[0, 2], [1, 1]]), 4)
    assert rows.tolist() == [[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_a_head_told_where_to_look_outputs_the_value_that_stands_there():
    model = llama_like()
    places = torch.tensor([[1], [0], [2]])
    at = torch.tensor([-1, 3, 2])
    rows = rows_on(places, CLEAN.shape[1])
    with interpret.record(model, ["blocks.1.mixer.{pattern,value,heads}"]) as plain, torch.no_grad():
        before = model(CLEAN)
    with (
        attending(model, [(1, 2)], rows, at),
        interpret.record(model, ["blocks.1.mixer.{pattern,heads}"]) as seen,
        torch.no_grad(),
    ):
        after = model(CLEAN)
    pattern, heads = seen["blocks.1.mixer.pattern"], seen["blocks.1.mixer.heads"]
    assert torch.allclose(pattern.sum(-1), torch.ones(pattern.shape[:-1]), atol=1e-6)
    values = plain["blocks.1.mixer.value"].unflatten(-1, (2, -1))  # two key-value heads; query head 2 reads the second
    expected = plain["blocks.1.mixer.heads"].clone()
    for row, place in enumerate((CLEAN.shape[1] - 1, 3, 2)):
        assert torch.equal(pattern[row, 2, place], rows[row])
        expected[row, place, 2] = values[row, places[row, 0], 1]
    assert torch.allclose(heads, expected, atol=1e-5)
    assert not torch.allclose(before[:, -1], after[:, -1])
    assert torch.equal(model(CLEAN), before)


def test_a_head_given_its_own_pattern_changes_nothing():
    model = llama_like()
    with interpret.record(model, ["blocks.0.mixer.pattern"]) as seen, torch.no_grad():
        before = model(CLEAN)
    with attending(model, [(0, 1)], seen["blocks.0.mixer.pattern"][:, 1, 3], at=3), torch.no_grad():
        assert torch.allclose(model(CLEAN), before, atol=1e-5)


def test_wrong_input_is_refused_with_what_would_be_right():
    model = llama_like()
    for stages, message in (
        ({}, "at least one stage"),
        ({"movers": "q"}, "write 'logits'"),
        ({"movers": "logits", "before": "logits"}, "letters of 'qkv'"),
        ({"movers": "logits", "before": ""}, "letters of 'qkv'"),
    ):
        with pytest.raises(ValueError, match=message):
            staged_circuit(model, CLEAN, CORRUPTED, METRIC, stages, top=0.1)
    for options, message in (
        ({}, "give top"),
        ({"top": 1.5}, "above 0 and at most 1"),
        ({"over": -0.1}, "0 or more"),
        ({"top": 0.1, "relative_to": "stages"}, "did you mean 'stage'"),
    ):
        with pytest.raises(ValueError, match=message):
            staged_circuit(model, CLEAN, CORRUPTED, METRIC, STAGES, **options)
    with pytest.raises(ValueError, match="no effect to take shares of"):
        staged_circuit(model, CLEAN, CLEAN, METRIC, STAGES, top=0.1)
    with pytest.raises(ValueError, match="they have 0 and 1"):
        overlap([], [(0, 0)])
    with pytest.raises(ValueError, match=r"\(7, 0\).* not among the 6 heads"):
        chance_overlap([(7, 0)], [(0, 0)], HEADS)
    with pytest.raises(ValueError, match="did you mean 'jaccard'"):
        chance_overlap([(0, 0)], [(0, 0)], HEADS, measure="jacard")
    with pytest.raises(ValueError, match="positions 0 to 3"):
        rows_on(torch.tensor([[4]]), 4)
    with pytest.raises(ValueError, match="at least one a prompt"):
        rows_on(torch.tensor([1]), 4)


def test_rows_that_are_no_attention_are_refused():
    model = llama_like()
    batch, time = CLEAN.shape
    good = rows_on(torch.zeros(batch, 1, dtype=torch.int64), time)
    negative = good.clone()
    negative[1, 0], negative[1, 1] = 1.5, -0.5
    for heads, rows, at, message in (
        ([(9, 0)], good, -1, r"head \(9, 0\): the model has heads \(0, 0\) to \(2, 3\)"),
        ([(1, 0)], 0.9 * good, -1, "sum to 1; row 0 sums to 0.9000"),
        ([(1, 0)], negative, -1, "row 1 sums to 1.0000, its smallest is -0.5000"),
        ([(1, 0)], good[0], -1, "one row a prompt"),
        ([(1, 0)], good, time, f"positions of {time} tokens"),
        ([(1, 0)], rows_on(torch.full((batch, 1), 3), time), 2, "after the position that looks"),
    ):
        with pytest.raises(ValueError, match=message), attending(model, heads, rows, at):
            pass
    with attending(model, [(1, 0)], good), pytest.raises(ValueError, match=f"rows are for {batch} prompts"):
        model(CLEAN[:1])
