import pytest
import torch
from torch import nn

from paperworks import interpret
from paperworks.interpret.circuits.patching import (
    Patching,
    Site,
    aligned,
    answer_probability,
    gaussian_corruption,
    kl_divergence,
    logit_difference,
)
from tests.interpret.lenses.test_logit_lens import llama_like
from tests.parity.families import oracle

CLEAN = torch.randint(1, 31, (3, 7), generator=torch.Generator().manual_seed(1))
CORRUPTED = torch.where(torch.arange(7) == 2, (CLEAN + 5) % 31, CLEAN)
ANSWER, AGAINST = torch.tensor([3, 5, 7]), torch.tensor([4, 6, 8])
METRIC = logit_difference(ANSWER, AGAINST)


@pytest.fixture(scope="module")
def model():
    return llama_like()


def patching(model, **options):
    return Patching(model, CLEAN, METRIC, CORRUPTED, **options)


def by_hand(model, base, source, change):
    """The definition, without our tools: hooks set by hand on the base run, values kept from the source run."""
    kept = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: kept.__setitem__(path, o.detach()))
        for path in change
    ]
    with torch.no_grad():
        model(source)
    for hook in hooks:
        hook.remove()

    def put(path):
        def hook(module, inputs, output):
            new = output.clone()
            new[change[path]] = kept[path][change[path]]
            return new

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(put(path)) for path in change]
    with torch.no_grad():
        logits = model(base)[:, -1]
    for hook in hooks:
        hook.remove()
    return (logits[torch.arange(3), ANSWER] - logits[torch.arange(3), AGAINST]).mean().item()


@pytest.mark.parity
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_sweeps_equal_a_loop_written_by_hand(model, direction):
    found = patching(model, direction=direction)
    base, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    start, end = by_hand(model, base, base, {}), by_hand(model, source, source, {})
    layers = [f"blocks.{index}" for index in range(3)]
    stream = found.by_position(layers, range(7))
    for row, path in enumerate(layers):
        for position in range(7):
            score = by_hand(model, base, source, {path: (slice(None), position)})
            assert stream[row, position].item() == pytest.approx((score - start) / (end - start), abs=1e-5)
    heads = found.by_head([f"{path}.mixer.heads" for path in layers], 4, position=-1)
    for row, path in enumerate(layers):
        for head in range(4):
            score = by_hand(model, base, source, {f"{path}.mixer.heads": (slice(None), 6, head)})
            assert heads[row, head].item() == pytest.approx((score - start) / (end - start), abs=1e-5)


def test_a_window_patches_its_neighbours_together(model):
    found = patching(model)
    paths = [f"blocks.{index}.feedforward" for index in range(3)]
    windowed = found.by_position(paths, [2, 5], window=2)
    assert windowed[0, 0].item() == pytest.approx(found.effect([Site(paths[0], 2)]), abs=1e-6)
    assert windowed[2, 1].item() == pytest.approx(found.effect([Site(paths[1], 5), Site(paths[2], 5)]), abs=1e-6)
    three = found.by_position(paths, [2], window=3)
    assert three[1, 0].item() == pytest.approx(found.effect([Site(path, 2) for path in paths]), abs=1e-6)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_the_whole_stream_goes_all_the_way(model, direction):
    found = patching(model, direction=direction)
    for layer in range(3):
        assert found.effect([Site(f"blocks.{layer}")]) == pytest.approx(1.0, abs=1e-5)
        every = [Site(f"blocks.{layer}", position) for position in range(7)]
        assert found.effect(every) == pytest.approx(1.0, abs=1e-5)
    assert found.effect([Site("blocks.2", -1)]) == pytest.approx(1.0, abs=1e-5)  # only the last position is read
    assert found.effect([Site("blocks.2", 3)]) == pytest.approx(0.0, abs=1e-6)


def test_identical_prompts_change_nothing(model):
    same = Patching(model, CLEAN, METRIC, CLEAN)
    assert same.score([Site("blocks.1", 2), Site("blocks.0.mixer.heads", None, 1)]) == same.clean_score
    with pytest.raises(ValueError, match="no effect to take a share of"):
        same.effect([Site("blocks.1")])


def test_the_effect_does_not_depend_on_the_scale_of_the_metric(model):
    plain = patching(model)
    scaled = Patching(model, CLEAN, lambda logits: 3 - 7 * METRIC(logits), CORRUPTED)
    site = [Site("blocks.1", 4)]
    assert plain.effect(site) == pytest.approx(scaled.effect(site), abs=1e-5)


def test_effects_are_ratios_of_means_not_means_of_ratios(model):
    found = patching(model)
    score = by_hand(model, CORRUPTED, CLEAN, {"blocks.0": (slice(None), 2)})
    with torch.no_grad():
        clean, corrupted = METRIC(model(CLEAN)).mean(), METRIC(model(CORRUPTED)).mean()
    assert found.effect([Site("blocks.0", 2)]) == pytest.approx(
        ((score - corrupted) / (clean - corrupted)).item(), abs=1e-5
    )


class Gate(nn.Module):
    """Two parts that each pass on one input, and a Boolean function of them."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.kind = nn.Identity(), nn.Identity(), kind

    def forward(self, x):
        one, two = self.first(x[:, 0]), self.second(x[:, 1])
        return one * two if self.kind == "and" else 1 - (1 - one) * (1 - two)


@pytest.mark.parametrize(("kind", "denoised", "noised"), [("and", 0.0, 1.0), ("or", 1.0, 0.0)])
def test_serial_parts_show_in_noising_and_parallel_ones_in_denoising(kind, denoised, noised):
    gate = Gate(kind)
    clean, corrupted = torch.ones(1, 2), torch.zeros(1, 2)
    for part in ("first", "second"):
        for direction, expected in (("denoise", denoised), ("noise", noised)):
            found = Patching(gate, clean, lambda y: y, corrupted, direction=direction)
            assert found.effect([Site(part)]) == expected
            assert found.effect([Site("first"), Site("second")]) == 1.0


def test_metrics_follow_their_definitions(model):
    with torch.no_grad():
        logits, other = model(CLEAN), model(CORRUPTED)
    at = torch.tensor([1, 3, 6])
    rows = torch.arange(3)
    assert torch.allclose(answer_probability(ANSWER, at)(logits), logits.softmax(-1)[rows, at, ANSWER])
    assert torch.allclose(
        logit_difference(ANSWER, AGAINST, 2)(logits), logits[rows, 2, ANSWER] - logits[rows, 2, AGAINST]
    )
    p, q = logits.double().softmax(-1)[rows, at], other.double().softmax(-1)[rows, at]
    expected = (p * (p / q).log()).sum(-1)
    assert (kl_divergence(logits, at)(other) - expected).abs().max() < 1e-5
    assert kl_divergence(logits, at)(logits).abs().max() == 0


def test_with_kl_to_the_clean_run_denoising_everything_gives_one(model):
    with torch.no_grad():
        reference = model(CLEAN)
    found = Patching(model, CLEAN, kl_divergence(reference), CORRUPTED)
    assert found.clean_score == 0
    assert found.effect([Site("blocks.1")]) == pytest.approx(1.0, abs=1e-5)


def test_ablations_put_in_zero_the_mean_or_another_row(model):
    site = Site("blocks.1.mixer.heads", 6, 2)
    with interpret.record(model, site.path) as seen, torch.no_grad():
        model(CLEAN)
    source = seen[site.path]
    expected = {
        "zero": source * 0,
        "mean": source.mean(0, keepdim=True).expand_as(source),
        "resample": source.roll(1, 0),
    }
    for value, replacement in expected.items():

        def put(heads, replacement=replacement):
            new = heads.clone()
            new[:, 6, 2] = replacement[:, 6, 2]
            return new

        with interpret.edit(model, {site.path: put}), torch.no_grad():
            score = METRIC(model(CORRUPTED)).mean().item()
        assert patching(model, value=value).score([site]) == pytest.approx(score, abs=1e-6)


def test_gaussian_corruption_hits_its_positions_with_three_standard_deviations(model):
    corruption = gaussian_corruption(model, [2, 3])
    with interpret.edit(model, corruption), interpret.record(model, "embedding") as seen, torch.no_grad():
        model(CLEAN.repeat(100, 1))
    noise = seen["embedding"] - model.embedding(CLEAN.repeat(100, 1))
    assert not noise[:, [0, 1, 4, 5, 6]].any()
    sigma = 3 * model.embedding.weight.std()
    assert abs(noise[:, 2:4].std() / sigma - 1) < 0.05  # 9,600 draws: seven standard errors
    found = Patching(model, CLEAN, METRIC, corruption=corruption)
    assert found.effect([Site("embedding", 2), Site("embedding", 3)]) == pytest.approx(1.0, abs=1e-5)
    assert found.effect([Site("embedding", 5)]) == pytest.approx(0.0, abs=1e-6)


def test_positions_may_differ_from_row_to_row(model):
    found = patching(model)
    last = torch.full((3,), 6)
    assert found.score([Site("blocks.0", last)]) == found.score([Site("blocks.0", -1)])
    mask = Site("blocks.0", torch.tensor([0, 2, 4])).mask(torch.zeros(3, 7, 16))
    assert mask[:, :, 0].nonzero().tolist() == [[0, 0], [1, 2], [2, 4]]


def test_a_pattern_can_be_patched_head_by_head_and_query_by_query(model):
    found = patching(model)
    with interpret.record(model, "blocks.1.mixer.pattern") as seen, torch.no_grad():
        model(CLEAN)

    def put(pattern):
        new = pattern.clone()
        new[:, 3, 6] = seen["blocks.1.mixer.pattern"][:, 3, 6]
        return new

    with interpret.edit(model, {"blocks.1.mixer.pattern": put}), torch.no_grad():
        score = METRIC(model(CORRUPTED)).mean().item()
    assert found.score([Site("blocks.1.mixer.pattern", 6, 3)]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parity
def test_transformers_models_are_patched_at_their_own_paths():
    theirs = oracle("llama2")
    metric = lambda output: METRIC(output.logits)  # noqa: E731
    found = Patching(theirs, CLEAN, metric, CORRUPTED)
    effects = found.by_position(["model.layers.0", "model.layers.2"], range(7))
    with torch.no_grad():
        clean = theirs(CLEAN, output_hidden_states=True).hidden_states[1]
        with interpret.edit(theirs, {"model.layers.0": lambda x: torch.cat((x[:, :2], clean[:, 2:3], x[:, 3:]), 1)}):
            score = metric(theirs(CORRUPTED)).mean().item()
    assert effects[0, 2].item() == pytest.approx(found.normalized(score), abs=1e-5)
    assert effects[1, 6].item() == pytest.approx(1.0, abs=1e-4)


class Words:
    """One token a word."""

    def encode(self, text):
        return [sum(map(ord, word)) for word in text.split()]

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_prompts_of_unequal_length_are_shown_side_by_side():
    with pytest.raises(ValueError, match="pair 1 has 3 clean and 4 corrupted tokens") as caught:
        aligned([[1, 2], [1, 22, 3]], [[1, 3], [1, 4, 3, 5]])
    shown = str(caught.value).splitlines()
    assert shown[1] == "clean      1|22|3|-"
    assert shown[2] == "corrupted  1|4 |3|5"
    assert shown[3].rstrip() == "            |^ | |^"
    with pytest.raises(ValueError, match=r"clean +<\d+> *\|<\d+>"):
        aligned(["Paris is"], ["The city is"], Words())
    with pytest.raises(ValueError, match="pair 1 has 2 tokens and pair 0 3"):
        aligned([[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2]])
    clean, corrupted = aligned([[1, 2]], [[1, 3]])
    assert clean.tolist() == [[1, 2]]
    assert corrupted.tolist() == [[1, 3]]


def test_wrong_input_is_refused_with_what_would_be_right(model):
    with pytest.raises(ValueError, match=r"\(3, 7\) and corrupted \(3, 6\).*aligned"):
        Patching(model, CLEAN, METRIC, CORRUPTED[:, :6])
    with pytest.raises(ValueError, match="either corrupted tokens or a corruption"):
        Patching(model, CLEAN, METRIC)
    with pytest.raises(ValueError, match="unknown direction 'denoising'; did you mean 'denoise'"):
        patching(model, direction="denoising")
    with pytest.raises(ValueError, match="unknown value 'means'; did you mean 'mean'"):
        patching(model, value="means")
    found = patching(model)
    for site, message in (
        (Site("blocks.1", 7), "positions 0 to 6"),
        (Site("blocks.1.mixer.heads", None, 4), "heads 0 to 3"),
        (Site("blocks.1", None, 0), "has no dimension for heads"),
    ):
        with pytest.raises(ValueError, match=message):
            found.score([site])
    with pytest.raises(ValueError, match="Near misses"):
        found.score([Site("blocks.7")])
    with pytest.raises(ValueError, match="at least 1; got 0"):
        found.by_position(["blocks.1"], [0], window=0)
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        aligned(["a"], ["b"])
    with pytest.raises(ValueError, match="1 clean and 0 corrupted"):
        aligned([[1]], [])
