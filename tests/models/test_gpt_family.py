"""Published sizes of GPT, GPT-3 and OpenELM, more tokens for a model, and heads for tasks."""

from dataclasses import replace

import pytest
import torch

import paperworks as pw
from paperworks import adapt, train
from paperworks.data.tasks.task_inputs import TaskInputs, task_batch
from paperworks.models import DecoderModel
from paperworks.models.heads import TaskModel
from paperworks.models.presets.gpt import gpt1, gpt3
from paperworks.models.presets.openelm import openelm
from paperworks.models.surgery.vocabulary import with_more_tokens
from paperworks.nn import Placement
from paperworks.train.tasks import task_accuracy, task_loss

SIZES = {
    "gpt1": 116_534_784,
    # OpenAI's table of compute: 125M, 356M, 760M, 1.32B, 2.65B, 6.66B, 12.85B, 174.6B
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "openelm-270m": 271_527_168,
    "openelm-450m": 457_179_136,
    "openelm-1.1b": 1_079_891_456,
    "openelm-3b": 3_036_647_424,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_as_published(name: str) -> None:
    assert pw.count_parameters(pw.preset(name)) == SIZES[name]


def test_gpt3_xl_has_the_published_size_with_16_heads() -> None:
    assert abs(pw.count_parameters(pw.preset("gpt3-xl")) / 1e9 - 1.32) < 0.01


def test_openelm_heads_and_hidden_units_are_those_of_the_released_configuration() -> None:
    spec = pw.preset("openelm-270m")
    heads = [block.mixer.heads for block in spec.blocks]
    assert heads == [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20]
    assert [block.mixer.kv_heads for block in spec.blocks] == [count // 4 for count in heads]
    assert [block.feedforward.hidden for block in spec.blocks] == [
        768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120,
    ]  # fmt: skip


def test_openelm_layers_of_unequal_size_decode_from_their_caches() -> None:
    torch.manual_seed(0)
    spec = openelm(32, 3, 4, vocab_size=50, divisor=8, attention=(0.5, 2.0))
    assert len({block.mixer.heads for block in spec.blocks}) == 3
    model = spec.build().double().eval()
    tokens = torch.randint(50, (2, 9))
    cache = model.new_cache(2, 9)
    steps = [model(tokens[:, t : t + 1], Placement(cache=cache)) for t in range(9)]
    assert torch.allclose(torch.cat(steps, 1), model(tokens), atol=1e-10)
    with pytest.raises(ValueError, match="depth 2 or more"):
        openelm(32, 1, 4)


def test_gpt3_alternates_full_and_banded_layers() -> None:
    torch.manual_seed(0)
    spec = gpt3(16, 2, 2, 8, window=3, vocab_size=20, context=12)
    assert [block.mixer.window for block in spec.blocks] == [None, 3]
    mixer = spec.blocks[1].mixer.build(16).double()
    torch.nn.init.normal_(mixer.output.weight)
    from paperworks.nn import Placement

    x = torch.randn(1, 10, 16, dtype=torch.float64)
    heads = {name: getattr(mixer, name)(x).unflatten(-1, (2, 8)).transpose(1, 2) for name in ("query", "key", "value")}
    scores = heads["query"] @ heads["key"].transpose(-1, -2) * 8**-0.5
    at = torch.arange(10)
    hidden = (at > at[:, None]) | (at <= at[:, None] - 3)
    naive = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ heads["value"]
    expected = mixer.output(naive.transpose(1, 2).flatten(2))
    assert torch.allclose(mixer(x, Placement().resolve(1, 10, x.device)), expected, atol=1e-12)


def small() -> DecoderModel:
    torch.manual_seed(0)
    return replace(gpt1(16, 2, 2, vocab_size=11, context=16), init_std=0.2).build().double().eval()


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens_leave_the_old_logits_as_they_were(tied: bool) -> None:
    torch.manual_seed(0)
    model = replace(gpt1(16, 2, 2, vocab_size=11, context=16), tied=tied).build().double().eval()
    more = with_more_tokens(model, 3)
    tokens = torch.randint(11, (2, 7))
    assert more.spec.vocab_size == 14
    assert more(torch.tensor([[13]])).shape == (1, 1, 14)
    # products of other shapes add in another order: a few units in the last place of logits near 1
    assert (more(tokens)[..., :11] - model(tokens)).abs().max() < 1e-14
    assert (more.unembedding.weight is more.embedding.weight) == tied
    with torch.no_grad():
        more.blocks[0].mixer.query.weight.zero_()
    assert model.blocks[0].mixer.query.weight.abs().max() > 0  # a copy
    with pytest.raises(ValueError, match="at least 1"):
        with_more_tokens(model, 0)
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    with pytest.raises(TypeError, match=r"adapt\.merge"):
        with_more_tokens(model, 1)


def test_inputs_stand_as_in_figure_1() -> None:
    inputs = TaskInputs.after(11)
    assert inputs.classification([1, 2]) == [[11, 1, 2, 13]]
    assert inputs.entailment([1, 2], [3]) == [[11, 1, 2, 12, 3, 13]]
    assert inputs.similarity([1], [2]) == [[11, 1, 12, 2, 13], [11, 2, 12, 1, 13]]
    assert inputs.choice([1], [[2], [3]]) == [[11, 1, 12, 2, 13], [11, 1, 12, 3, 13]]
    batch = task_batch([inputs.similarity([1], [2, 3]), inputs.similarity([4], [5])], [1, 0])
    assert batch["tokens"].shape == (2, 2, 6)
    assert batch["segments"][1, 0].tolist() == [1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="at least 2 answers"):
        inputs.choice([1], [[2]])
    with pytest.raises(ValueError, match="the model reads 5"):
        task_batch([inputs.entailment([1, 2], [3])], [0], context=5)
    with pytest.raises(ValueError, match="equally many"):
        task_batch([inputs.classification([1]), inputs.similarity([1], [2])], [0, 1])


def test_similarity_does_not_see_the_order_and_entailment_does() -> None:
    model = with_more_tokens(small(), 3)
    inputs = TaskInputs.after(11)
    summed, plain = TaskModel(model, 3, reading="sum").eval(), TaskModel(model, 3).eval()
    one = task_batch([inputs.similarity([1, 2], [3])], [0])
    other = task_batch([inputs.similarity([3], [1, 2])], [0])
    assert torch.allclose(
        summed(one["tokens"], one["segments"]).task, summed(other["tokens"], other["segments"]).task, atol=1e-14
    )
    one, other = (task_batch([inputs.entailment(a, b)], [0]) for a, b in (([1, 2], [3]), ([3], [1, 2])))
    gap = plain(one["tokens"], one["segments"]).task - plain(other["tokens"], other["segments"]).task
    assert gap.abs().max() > 1e-4


def test_padding_does_not_move_the_extract_token() -> None:
    model = TaskModel(with_more_tokens(small(), 3), 2).eval()
    inputs = TaskInputs.after(11)
    alone = task_batch([inputs.classification([1, 2])], [0])
    padded = task_batch([inputs.classification([1, 2]), inputs.classification([3] * 9)], [0, 1])
    assert torch.allclose(
        model(alone["tokens"], alone["segments"]).task[0],
        model(padded["tokens"], padded["segments"]).task[0],
        atol=1e-12,
    )


def test_the_loss_is_the_sum_of_both() -> None:
    model = TaskModel(with_more_tokens(small(), 3), 2).eval()
    inputs = TaskInputs.after(11)
    batch = task_batch([inputs.classification([1, 2]), inputs.classification([3, 4, 5, 6])], [0, 1])
    total, metrics = task_loss(0.5)(model, batch)
    said = model(batch["tokens"], batch["segments"], language=True)
    task = -said.task.log_softmax(-1)[[0, 1], [0, 1]].mean()
    logs = said.language.log_softmax(-1)
    terms = [-logs[0, t, batch["tokens"][0, 0, t + 1]] for t in range(3)]
    terms += [-logs[1, t, batch["tokens"][1, 0, t + 1]] for t in range(5)]
    assert torch.allclose(total, task + 0.5 * torch.stack(terms).mean(), atol=1e-12)
    assert torch.equal(task_loss(0.0)(model, batch)[0], metrics["task"])
    with pytest.raises(ValueError, match="at least 0"):
        task_loss(-1.0)


def test_a_task_is_learned_by_the_one_loop() -> None:
    torch.manual_seed(0)
    model = TaskModel(with_more_tokens(small().float(), 3), 2)
    inputs = TaskInputs.after(11)
    texts = torch.randint(1, 11, (64, 6)).tolist()
    batch = task_batch([inputs.classification(text) for text in texts], [int(text[-1] > 5) for text in texts])
    train.fit(model, task_loss(), [batch], train.Settings(steps=80, lr=1e-2, progress=False))
    assert task_accuracy(model, [batch]) > 0.9


def test_wrong_shapes_and_readings_are_named() -> None:
    model = small()
    with pytest.raises(ValueError, match="reading"):
        TaskModel(model, reading="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 classes"):
        TaskModel(model, 1)
    with pytest.raises(ValueError, match="batch, sequences, time"):
        TaskModel(model)(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="one sequence for"):
        TaskModel(model)(torch.ones(1, 2, 3, dtype=torch.int64))
