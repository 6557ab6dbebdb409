"""One model's autoencoder on another, and on the same model turned around."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from paperworks import adapt
from paperworks.interpret import edit, record, sae
from paperworks.interpret.sae.evaluation import transfer
from paperworks.models import Block, Decoder
from paperworks.models.presets.families import llama
from paperworks.nn import Attention, GatedMLP, LayerNorm, LearnedPositions, RMSNorm

DIM, TAP = 16, "blocks.0"


def model(seed=0, **options):
    torch.manual_seed(seed)
    made = llama(vocab_size=11, dim=DIM, depth=2, heads=2, hidden=24).build().double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(6)  # logits that matter
    return made


def batches():
    tokens = torch.randint(11, (3, 4, 9), generator=torch.Generator().manual_seed(7))
    return [{"tokens": each[:, :-1], "targets": each[:, 1:]} for each in tokens]


def loss(model, batch):
    logits = model(batch["tokens"])
    return cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"), batch["targets"].numel()


KINDS = {
    "standard": sae.Standard(latents=20, penalty=1.0),
    "weighted": sae.Standard(latents=20, penalty=1.0, decoder="weighted"),
    "gated": sae.Gated(latents=20, penalty=1.0),
    "jumprelu": sae.JumpReLU(latents=20, penalty=1.0, threshold=0.1),
    "topk": sae.TopK(latents=20, k=4),
}


def autoencoder(kind="weighted", seed=1):
    torch.manual_seed(seed)
    made = KINDS[kind].build(DIM).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name not in ("decoder", "encoder"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_the_table_is_what_each_cell_measures_by_hand():
    one, other = model(0), model(1)
    with torch.no_grad():  # a token that is far longer than all others, in one of them
        other.embedding.weight[3] *= 60
    dictionaries = {"a": autoencoder(seed=1), "b": autoencoder("topk", seed=2)}
    found = transfer.transfer_table({"one": one, "other": other}, dictionaries, TAP, batches(), loss)
    assert set(found.cells) == {(a, b) for a in "ab" for b in ("one", "other")}
    assert found.outliers["one"].share == 0.0
    for name, machine in (("one", one), ("other", other)):
        with torch.no_grad(), record(machine, TAP) as seen:
            for batch in batches():
                machine(batch["tokens"])
        rows = torch.cat([each[:, 1:].flatten(0, 1) for each in seen.all[TAP]])
        lengths = rows.norm(dim=1)
        longest = 5 * float(lengths.median())
        kept = rows[lengths <= longest]
        out = found.outliers[name]
        assert out.longest == pytest.approx(longest)
        assert out.share == pytest.approx(1 - len(kept) / len(rows))
        assert out.of_square == pytest.approx(1 - float(kept.square().sum() / rows.square().sum()))
        for key, dictionary in dictionaries.items():
            cell = found.cells[key, name]
            with torch.no_grad():
                latents = dictionary.encode(kept)
                made = dictionary.decode(latents)
            fvu = (kept - made).square().sum() / (kept - kept.mean(0)).square().sum()
            assert cell.fvu == pytest.approx(float(fvu))
            assert cell.l0 == pytest.approx(float((latents > 0).double().sum(1).mean()))
            assert cell.scale == pytest.approx(float((kept.square().sum() / made.square().sum()).sqrt()))

            def put(x, dictionary=dictionary, longest=longest):
                x = x.clone()
                for row in range(len(x)):
                    for place in range(1, x.shape[1]):
                        if x[row, place].norm() <= longest:
                            x[row, place] = dictionary(x[row, place][None])[0]
                return x

            with torch.no_grad(), edit(machine, {TAP: put}):
                total = sum(float(loss(machine, batch)[0]) for batch in batches())
            assert cell.spliced.spliced == pytest.approx(total / (3 * 4 * 8))
            mean = kept.mean(0, keepdim=True)
            in_place = {TAP: lambda x, put=put, mean=mean: put(x, lambda _: mean)}
            with torch.no_grad(), edit(machine, in_place):
                ablated = sum(float(loss(machine, batch)[0]) for batch in batches()) / (3 * 4 * 8)
            assert cell.mean == pytest.approx(ablated)
            expected = (ablated - cell.spliced.spliced) / (ablated - cell.spliced.clean)
            assert cell.recovered_over_mean == pytest.approx(expected)
    assert 0 < found.outliers["other"].share < 0.5
    assert found.outliers["other"].of_square > 0.5


def test_between_identical_models_nothing_is_lost():
    one = model()
    found = transfer.transfer_table({"a": one, "b": copy.deepcopy(one)}, {"s": autoencoder()}, TAP, batches(), loss)
    assert found.cells["s", "a"] == found.cells["s", "b"]
    assert found.outliers["a"] == found.outliers["b"]


def learned_positions():
    torch.manual_seed(2)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, bias=True), feedforward=GatedMLP(hidden=20))
    spec = Decoder(
        vocab_size=11, dim=DIM, depth=2, norm=RMSNorm(), block=block, position=LearnedPositions(length=9), tied=True
    )
    made = spec.build().double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("make", [model, learned_positions])
def test_a_turned_model_computes_the_same_with_its_stream_turned(make):
    one = make()
    before = copy.deepcopy(one.state_dict())
    rotation = transfer.random_rotation(DIM, torch.Generator().manual_seed(3))
    turned = transfer.rotate_stream(one, rotation)
    tokens = batches()[0]["tokens"]
    with torch.no_grad(), record(one, "blocks.*") as seen:
        logits = one(tokens)
    with torch.no_grad(), record(turned, "blocks.*") as other:
        assert (turned(tokens) - logits).abs().max() < 1e-10
    for layer in range(2):
        assert (other[f"blocks.{layer}"] - seen[f"blocks.{layer}"] @ rotation.T).abs().max() < 1e-10
        assert (other[f"blocks.{layer}"] - seen[f"blocks.{layer}"]).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    half = transfer.rotate_stream(one.float(), rotation)  # float64 rotation, float32 model
    assert half.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_autoencoder_is_exact_on_turned_activations_and_the_raw_one_is_not(kind):
    one = autoencoder(kind)
    rotation = transfer.random_rotation(DIM, torch.Generator().manual_seed(4))
    x = torch.randn(50, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    turned = transfer.rotate_autoencoder(one, rotation)
    with torch.no_grad():
        assert torch.allclose(turned.encode(x @ rotation.T), one.encode(x), atol=1e-12)
        assert torch.allclose(turned(x @ rotation.T), one(x) @ rotation.T, atol=1e-12)
        assert (one(x @ rotation.T) - one(x) @ rotation.T).abs().max() > 0.1
    assert one.decoder is not turned.decoder


def test_a_random_rotation_is_orthogonal_and_another_each_time():
    generator = torch.Generator().manual_seed(0)
    first, second = (transfer.random_rotation(5, generator) for _ in range(2))
    for each in (first, second):
        assert (each @ each.T - torch.eye(5)).abs().max() < 1e-12
    assert (first - second).abs().max() > 0.1
    # Uniform over all orthogonal matrices, the first entry has mean 0; plain QR would make it negative or positive.
    entries = torch.stack([transfer.random_rotation(3, generator)[0, 0] for _ in range(400)])
    assert abs(float(entries.mean())) < 0.1  # standard error 0.03
    assert transfer.random_rotation(3, dtype=torch.float32).dtype == torch.float32


def test_scale_cosines_and_gap():
    x = torch.randn(40, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert transfer.norm_mismatch(x, 3 * x) == pytest.approx(3.0)
    one = autoencoder()
    wide = transfer.rescaled(one, 3.0)
    with torch.no_grad():
        assert torch.allclose(wide(3 * x), 3 * one(x), atol=1e-12)
    other = autoencoder(seed=9)
    expected = [
        float(a @ b / (a.norm() * b.norm())) for a, b in zip(one.decoder.detach(), other.decoder.detach(), strict=True)
    ]
    assert transfer.decoder_cosines(one, other).tolist() == pytest.approx(expected)
    assert transfer.decoder_cosines(one, wide).tolist() == pytest.approx([1.0] * 20)
    assert transfer.gap_closed(0.4, 0.25, 0.2) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no gap to close"):
        transfer.gap_closed(0.2, 0.2, 0.2)
    with pytest.raises(ValueError, match="no latents in common"):
        transfer.decoder_cosines(one, sae.TopK(latents=3, k=1).build(DIM).double())
    with pytest.raises(ValueError, match="no scale"):
        transfer.norm_mismatch(x, 0 * x)


def test_what_cannot_be_turned_is_refused():
    rotation = transfer.random_rotation(DIM)
    with pytest.raises(ValueError, match="R R\\^T differs from the identity by 3"):
        transfer.rotate_stream(model(), 2 * rotation)
    with pytest.raises(ValueError, match="the stream has 16 dimensions"):
        transfer.rotate_stream(model(), transfer.random_rotation(5))
    with pytest.raises(ValueError, match="the stream has 16 dimensions"):
        transfer.rotate_autoencoder(autoencoder(), transfer.random_rotation(5))
    block = Block(norm=LayerNorm(), mixer=Attention(heads=2), feedforward=GatedMLP(hidden=20))
    with pytest.raises(ValueError, match="only an RMS norm"):
        transfer.rotate_stream(
            Decoder(vocab_size=11, dim=DIM, depth=1, norm=LayerNorm(), block=block).build(), rotation
        )
    partial = RMSNorm(fraction=0.5)
    block = Block(norm=partial, mixer=Attention(heads=2), feedforward=GatedMLP(hidden=20))
    with pytest.raises(ValueError, match="only an RMS norm"):
        transfer.rotate_stream(Decoder(vocab_size=11, dim=DIM, depth=1, norm=partial, block=block).build(), rotation)
    adapted = model().float()
    adapt.apply(adapted, adapt.LoRA(rank=2), targets="attention")
    with pytest.raises(ValueError, match="merge adapters"):
        transfer.rotate_stream(adapted, rotation)
    with pytest.raises(ValueError, match="has `writes_residual`"):
        transfer.rotate_stream(nn.Sequential(nn.Embedding(3, DIM), nn.Linear(DIM, 3)), rotation)
    with pytest.raises(ValueError, match="a table needs"):
        transfer.transfer_table({}, {"s": autoencoder()}, TAP, batches(), loss)
