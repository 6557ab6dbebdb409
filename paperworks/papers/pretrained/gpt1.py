"""GPT: a language model is trained first, and then learns a task from few labels."""

from __future__ import annotations

from dataclasses import replace

import torch

from paperworks import train
from paperworks.data.tasks.task_inputs import Sequences, TaskInputs, task_batch
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Decoder, DecoderModel, count_parameters, preset
from paperworks.models.heads import TaskModel
from paperworks.models.presets.gpt import gpt1
from paperworks.models.surgery.vocabulary import with_more_tokens
from paperworks.testbeds.characters import play
from paperworks.train.tasks import task_accuracy, task_loss

paper = Paper(
    key="gpt1",
    title="Improving Language Understanding by Generative Pre-Training",
    authors="Radford, Narasimhan, Salimans, Sutskever",
    year=2018,
    ref="OpenAI 2018",
    family="pretrained",
    summary=(
        "One transformer is trained to predict text and then, all of it, to solve a task from its labels: inputs "
        "become token sequences, and the last token's vector goes through one linear layer."
    ),
    implements=(
        "paperworks.models.presets.gpt.gpt1",
        "paperworks.models.heads.TaskModel",
        "paperworks.models.surgery.vocabulary.with_more_tokens",
        "paperworks.data.tasks.task_inputs.TaskInputs",
        "paperworks.train.tasks.task_loss",
    ),
)

PARAMETERS = 116_534_784  # vocabulary of 40,478, context of 512, tied
LENGTH = 64
LABELS = 500


@paper.claim(
    "The published size; similarity does not depend on the order of its texts",
    paper="Section 4.1: 12 layers, 768 wide, 40,000 merges; Section 3.3: both orders, added",
    kind="exact",
    control="the pair in one sequence, as for entailment",
)
@torch.no_grad()
def sizes_are_exact(lab: Lab) -> Verdict:
    """Count parameters, and swap the texts of pairs, in float64."""
    torch.manual_seed(lab.seed)
    model = replace(gpt1(32, 2, 4, vocab_size=20, context=32), init_std=0.2).build().double()
    inputs = TaskInputs.after(20)
    more = with_more_tokens(model, 3)
    summed, single = TaskModel(more, 2, reading="sum").eval(), TaskModel(more, 2).eval()
    pairs = torch.randint(20, (8, 2, 6)).tolist()
    swapped = [pair[::-1] for pair in pairs]
    none = [0] * len(pairs)

    def said(reader: TaskModel, examples: list[Sequences]) -> torch.Tensor:
        batch = task_batch(examples, none)
        return reader(batch["tokens"], batch["segments"]).task

    both = said(summed, [inputs.similarity(*pair) for pair in pairs])
    other = said(summed, [inputs.similarity(*pair) for pair in swapped])
    ordered = said(single, [inputs.entailment(*pair) for pair in pairs])
    reversed_ = said(single, [inputs.entailment(*pair) for pair in swapped])
    counted = count_parameters(preset("gpt1"))
    return lab.judge(
        checks={
            "parameters": counted == PARAMETERS,
            "similarity is the same both ways": float((both - other).abs().max()) < 1e-12,
            "entailment is not": float((ordered - reversed_).abs().max()) > 1e-3,
            "three embeddings and a head are all that is new": _parameters(single) - _parameters(model)
            == 3 * 32 + 2 * 32 + 2,
        },
        measured={"parameters": counted, "largest gap, similarity": float((both - other).abs().max())},
        control={"largest gap, entailment": float((ordered - reversed_).abs().max())},
    )


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _spec(lab: Lab) -> Decoder:
    """Four layers of width 128, post-norm, on characters; room for the three tokens of a task."""
    dim, depth = lab.pick(smoke=(32, 1), small=(128, 4))
    return gpt1(dim, depth, 4, vocab_size=play().tokenizer.vocab_size, context=LENGTH + 3)


def _pretrained(lab: Lab) -> tuple[DecoderModel, float]:
    """Train on the play; return the model and its held-out loss in nats a character."""
    steps = lab.pick(smoke=2, small=1000, large=10_000)
    torch.manual_seed(lab.seed)
    model = _spec(lab).build()
    batches = play().train_windows(length=LENGTH, batch=16, count=steps, seed=lab.seed)
    with lab.threads(1), lab.progress("language model", steps) as advance:
        train.fit(
            model,
            train.next_token_loss,
            batches,
            _settings(lab, steps, 1e-3),
            on_step=lambda _: advance(1),
        )
        held_out = play().held_out_windows(length=LENGTH, count=lab.pick(smoke=8, small=256))
        return model, train.evaluate(model, train.next_token_loss, held_out)["loss"]


def _settings(lab: Lab, steps: int, lr: float) -> train.Settings:
    return train.Settings(
        steps=steps,
        lr=lr,
        warmup=0.1,
        optimizer=train.AdamW(weight_decay=0.01),
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )


def _passages(text: torch.Tensor, count: int, draws: torch.Generator) -> tuple[list[list[int]], list[int]]:
    """Return passages as written (label 1) or with the order of their words shuffled (label 0), half of each.

    A passage has the same characters either way: what tells is which words follow which, and where lines end.
    """
    tokenizer = play().tokenizer
    texts, labels = [], []
    for index in range(count):
        start = int(torch.randint(len(text) - LENGTH, (1,), generator=draws))
        written = tokenizer.decode(text[start : start + LENGTH].tolist())
        if index % 2 == 0:
            words = written.split(" ")
            written = " ".join(words[place] for place in torch.randperm(len(words), generator=draws).tolist())
        texts.append(tokenizer.encode(written))
        labels.append(index % 2)
    return texts, labels


@paper.claim(
    "From 500 labels a pre-trained model learns what one from scratch does not",
    paper="Table 5: without pre-training 14.8% worse on average; the auxiliary loss helps the larger data sets",
    control="the same network, rate and steps from random weights",
)
def pretraining_helps(lab: Lab) -> Verdict:
    """Fine-tune on passages as written against passages with shuffled words, CoLA's kind of task, three ways."""
    play()  # before the bars: it may have to be fetched
    model, language = _pretrained(lab)
    draws = torch.Generator().manual_seed(lab.seed + 1)
    inputs = TaskInputs.after(model.spec.vocab_size)
    labels, tested = lab.pick(smoke=(16, 16), small=(LABELS, 1000))

    def batches(text: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
        texts, right = _passages(text, count, draws)
        order = torch.randperm(count, generator=draws).split(20)
        return [
            task_batch([inputs.classification(texts[i]) for i in part.tolist()], [right[i] for i in part.tolist()])
            for part in order
        ]

    learned_from, held_out = batches(play().training, labels), batches(play().validation, tested)
    epochs = lab.pick(smoke=1, small=6)
    accuracy: dict[str, list[float]] = {}
    arms = {
        "pre-trained": (True, 0.0),
        "pre-trained, auxiliary": (True, 0.5),
        "from scratch": (False, 0.0),
        "from scratch, auxiliary": (False, 0.5),
    }
    for name, (pretrained, auxiliary) in arms.items():
        accuracy[name] = []
        for seed in range(lab.pick(smoke=1, small=2)):
            torch.manual_seed(100 + lab.seed + seed)
            base = model if pretrained else _spec(lab).build()
            reader = TaskModel(with_more_tokens(base, 3))
            steps = epochs * len(learned_from)
            with lab.threads(1), lab.progress(f"{name}, seed {seed}", steps) as advance:
                train.fit(
                    reader,
                    task_loss(auxiliary),
                    learned_from,
                    replace(_settings(lab, steps, 5e-4), seed=seed),
                    on_step=lambda _: advance(1),
                )
                accuracy[name].append(task_accuracy(reader, held_out))
    means = {name: sum(values) / len(values) for name, values in accuracy.items()}
    with lab.figure("accuracy", figsize=(6.4, 2.8)) as figure:
        axes = figure.subplots()
        colors = [COLORS[0], COLORS[0], CONTROL, CONTROL]
        axes.barh(list(means)[::-1], [100 * value for value in means.values()][::-1], color=colors[::-1])
        axes.axvline(50, color="0.3", linewidth=1, linestyle="--")
        axes.set_xlabel(f"% of {tested} held-out passages told apart, after {labels} labels")
        axes.set_xlim(40, 100)
    return lab.judge(
        checks={
            "pre-trained: at least 10 points above from scratch": means["pre-trained"] >= means["from scratch"] + 0.10,
            "the auxiliary loss hurts by at most 2 points": means["pre-trained, auxiliary"]
            >= means["pre-trained"] - 0.02,
        },
        measured={
            "accuracy, pre-trained": accuracy["pre-trained"],
            "accuracy, pre-trained, auxiliary loss": accuracy["pre-trained, auxiliary"],
            "language model, nats a character": language,
        },
        control={
            "accuracy, from scratch": accuracy["from scratch"],
            "accuracy, from scratch, auxiliary loss": accuracy["from scratch, auxiliary"],
        },
        note=f"Post-norm GPT of four layers of width 128 on characters of tinyshakespeare; {labels} labelled passages "
        f"of {LENGTH} characters, {epochs} times, two seeds. The held-out passages are from text that neither training "
        "saw.",
    )
