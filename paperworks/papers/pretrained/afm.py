"""AFM: a small model is pruned out of a larger one by learned masks, then taught by its likeliest tokens."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks import train
from paperworks.compress.pruning.soft_topk import annealed, kept_units, mask_hidden_units, set_temperature
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.models import DecoderModel, count_parameters
from paperworks.models.presets.afm import afm, afm_on_device
from paperworks.models.surgery.pruning import keep_hidden_units
from paperworks.nn.feedforward.mlp import GatedMLPModule
from paperworks.testbeds.characters import BATCH, LENGTH, LR, play
from paperworks.train.distillation import Top1Distillation, top1_distillation_sum
from paperworks.train.objective import Loss

paper = Paper(
    key="afm",
    title="Apple Intelligence Foundation Language Models",
    authors="Gunter, Wang, Wang, Pang, Narayanan, et al.",
    year=2024,
    ref="arXiv:2407.21075",
    family="pretrained",
    summary=(
        "The on-device model starts from a larger one, whose feed-forward units are pruned by learned soft top-k "
        "masks, and is trained on a mixture of the label and the larger model's likeliest token."
    ),
    implements=(
        "paperworks.models.presets.afm.afm_on_device",
        "paperworks.train.distillation.Top1Distillation",
        "paperworks.compress.pruning.soft_topk.soft_top_k",
        "paperworks.models.surgery.pruning.keep_hidden_units",
    ),
)


@paper.claim(
    "Sizes, the gradient of the mixed target and pruning are what the report says",
    paper="Table 1: 2.58B parameters besides 0.15B of the embedding; the teacher has weight 0.9",
    kind="exact",
    control="masks cut while their temperature is still 1",
)
def sizes_gradient_and_cut(lab: Lab) -> Verdict:
    """Count on the meta device; compare gradients in float64; compare masked and cut models."""
    spec = afm_on_device()
    embedding = spec.vocab_size * spec.dim
    rest = count_parameters(spec) - embedding
    draws = torch.Generator().manual_seed(lab.seed)
    logits = torch.randn(64, 50, dtype=torch.float64, generator=draws, requires_grad=True)
    teacher = torch.randn(64, 50, dtype=torch.float64, generator=draws)
    labels = torch.randint(50, (64,), generator=draws)
    (gradient,) = torch.autograd.grad(top1_distillation_sum(logits, labels, teacher.argmax(-1)), logits)
    p, y, taught = logits.detach().softmax(-1), F.one_hot(labels, 50), F.one_hot(teacher.argmax(-1), 50)
    off = float((gradient - (0.1 * (p - y) + 0.9 * (p - taught))).abs().max())
    full = float((gradient - (0.1 * (p - y) + 0.9 * (p - teacher.softmax(-1)))).abs().max())
    torch.manual_seed(lab.seed)
    model = afm(32, 2, 4, 64, kv_heads=2, head_dim=8, vocab_size=50).build().double().eval()
    masks = mask_hidden_units(model, keep=0.5)
    tokens = torch.randint(50, (2, 32), generator=draws)
    with torch.no_grad():
        for mask in masks.values():
            mask.scores.normal_()
        for module in model.modules():
            if isinstance(module, GatedMLPModule):
                module.down.weight.mul_(20)  # so that a unit counts
        smaller = keep_hidden_units(model, kept_units(masks))
        soft = float((smaller(tokens) - model(tokens)).abs().max())
        set_temperature(masks, 0.0)
        hard = float((smaller(tokens) - model(tokens)).abs().max())
    return lab.judge(
        checks={
            "the gradient is 0.1 (p - y) + 0.9 (p - teacher's likeliest)": off < 1e-14,
            "with the teacher's whole distribution it would be another": full > 0.01,
            "the embedding has 0.15B": round(embedding / 1e9, 2) == 0.15,
            "all else 2.58B": round(rest / 1e9, 2) == 2.58,
            "the cut model equals the masked one at temperature 0": hard < 1e-12,
            "and not at temperature 1": soft > 1e-3,
        },
        measured={
            "largest difference of gradients": off,
            "embedding": embedding,
            "parameters besides": rest,
            "largest difference of logits, temperature 0": hard,
        },
        control={"largest difference of logits, temperature 1": soft},
        note="The feed-forward width is not printed; 8032 was chosen to give the printed number of parameters.",
    )


@dataclass(frozen=True)
class Score:
    """What a model came to on held-out text: nats a character; after one temperature; the share said right."""

    loss: float
    tempered: float
    accuracy: float


@dataclass(frozen=True)
class Runs:
    """The teacher, and each arm's scores, and curves of (step, held-out loss, share said right), by seed."""

    teacher: Score
    cut: Score  # half of the hidden units, before it is trained on
    cut_hard: Score  # a sixteenth
    scores: dict[str, list[Score]]
    curves: dict[str, list[list[tuple[int, float, float]]]]


ARMS = {
    "random": "half, from scratch",
    "pruned": "half, pruned",
    "labels": "a sixteenth, pruned",
    "distilled": "a sixteenth, pruned and distilled",
}
HARD = ("labels", "distilled")  # pruned so hard that the larger model has something to teach
SIZES = {"smoke": (1, 16, 32), "small": (6, 64, 256), "large": (6, 128, 512)}  # layers, width, hidden units
_DONE: dict[tuple[str, int], Runs] = {}  # both claims look at the same runs


def _fit(
    lab: Lab,
    model: DecoderModel,
    loss: Loss,
    steps: int,
    seed: int,
    description: str,
    look: Callable[[int], None] = lambda step: None,
    lr: float = LR,
) -> None:
    """Train by the recipe of the small models: AdamW, decay 0.1, a tenth of warm-up, cosine to a tenth."""
    settings = train.Settings(
        steps=steps,
        lr=lr,
        optimizer=train.AdamW(betas=(0.9, 0.95), weight_decay=0.1),
        warmup=0.1,
        seed=seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=seed)
    with lab.threads(1), lab.progress(description, steps) as advance:

        def after(step: int) -> None:
            look(step)
            advance(1)

        train.fit(model, loss, batches, settings, on_step=after)


def _runs(lab: Lab) -> Runs:
    key = (lab.scale, lab.seed)
    if key not in _DONE:
        _DONE[key] = _train(lab)
    return _DONE[key]


def _train(lab: Lab) -> Runs:
    steps, learning, half, hard = lab.pick(smoke=(2, 2, 2, 2), small=(800, 60, 150, 100), large=(4000, 300, 1000, 500))
    early = lab.pick(smoke=(1,), small=(5, 10, 25, 50, 75, 100), large=(25, 100, 300, 600))
    depth, dim, hidden = SIZES[lab.scale]
    torch.manual_seed(lab.seed)
    spec = afm(dim, depth, 4, hidden, kv_heads=2, head_dim=dim // 4, vocab_size=play().tokenizer.vocab_size)
    teacher = spec.build()
    _fit(lab, teacher, train.next_token_loss, steps, lab.seed, "the larger model")
    smaller, smallest = _pruned(lab, teacher, 1 / 2, learning), _pruned(lab, teacher, 1 / 16, learning)
    scores: dict[str, list[Score]] = {name: [] for name in ARMS}
    curves: dict[str, list[list[tuple[int, float, float]]]] = {name: [] for name in ARMS}
    for seed in range(lab.seed + 100, lab.seed + lab.pick(smoke=101, small=102)):  # other windows than the teacher's
        torch.manual_seed(seed)
        starts = {"random": smaller.spec.build(), "pruned": copy.deepcopy(smaller)}
        starts |= {name: copy.deepcopy(smallest) for name in HARD}
        for name, model in starts.items():
            curve: list[tuple[int, float, float]] = []

            def look(step: int, model: DecoderModel = model, curve: list[tuple[int, float, float]] = curve) -> None:
                if step in early:
                    seen = _score(lab, model, 128)
                    curve.append((step, seen.loss, seen.accuracy))
                    model.train()

            loss: Loss = Top1Distillation(teacher) if name == "distilled" else train.next_token_loss
            taken = hard if name in HARD else half
            _fit(lab, model, loss, taken, seed, f"{ARMS[name]}, seed {seed}", look)
            scores[name].append(_score(lab, model))
            last = _score(lab, model, 128)
            curves[name].append([*(each for each in curve if each[0] < taken), (taken, last.loss, last.accuracy)])
    return Runs(_score(lab, teacher), _score(lab, smaller), _score(lab, smallest), scores, curves)


def _pruned(lab: Lab, teacher: DecoderModel, keep: float, steps: int) -> DecoderModel:
    """Learn masks for a share of the hidden units with all weights frozen, and cut the others out."""
    masked = copy.deepcopy(teacher).requires_grad_(False)
    masks = mask_hidden_units(masked, keep=keep)

    def cool(step: int) -> None:
        set_temperature(masks, annealed(step, steps))

    # scores begin at 0 and must come to differ by more than the last temperatures: a tenth a step does that
    _fit(lab, masked, train.next_token_loss, steps, lab.seed + 50, f"masks, {keep:.3g}", cool, lr=0.1)
    return keep_hidden_units(masked, kept_units(masks)).requires_grad_(True)


@torch.no_grad()
def _score(lab: Lab, model: DecoderModel, windows: int = 512) -> Score:
    batches = play().held_out_windows(length=LENGTH, count=lab.pick(smoke=4, small=windows))
    with lab.threads(1):
        logits = torch.cat([model.eval()(batch["tokens"]).flatten(0, 1) for batch in batches])
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    middle = len(targets) // 2

    def nats(part: slice, temperature: float) -> float:
        return float(F.cross_entropy(logits[part] / temperature, targets[part]))

    temperatures: Tensor = torch.linspace(0.5, 4, 36)
    best = 1.0
    if windows == 512:  # curves do without
        best = min(temperatures.tolist(), key=lambda temperature: nats(slice(0, middle), temperature))
    accuracy = float((logits.argmax(-1) == targets).double().mean())
    return Score(nats(slice(None), 1.0), nats(slice(middle, None), best), accuracy)


def _mean(runs: Runs, arm: str, what: str) -> float:
    return statistics.fmean(getattr(score, what) for score in runs.scores[arm])


@paper.claim(
    "A model pruned by learned soft top-k masks starts ahead of one from scratch, and stays ahead",
    paper="The on-device recipe: starting from a pruned 6.4B model, and distillation, improve over training anew",
    control="the same small model from random weights, on the same windows for as many steps",
)
def pruning_is_a_start(lab: Lab) -> Verdict:
    """Halve the hidden units of a trained model; train what is left, and a new model of its size."""
    runs = _runs(lab)
    _draw(lab, runs)
    place = lab.pick(smoke=0, small=2)
    step = runs.curves["random"][0][place][0]
    early = {name: statistics.fmean(curve[place][1] for curve in runs.curves[name]) for name in ("random", "pruned")}
    ours, control = _mean(runs, "pruned", "loss"), _mean(runs, "random", "loss")
    return lab.judge(
        checks={
            f"at {step} steps its loss is at least 0.05 nats lower": early["pruned"] <= early["random"] - 0.05,
            "at the end it is lower": ours < control,
        },
        measured={
            f"loss at {step} steps, pruned": early["pruned"],
            "loss at the end, pruned": ours,
            "loss at the end by seed, pruned": [score.loss for score in runs.scores["pruned"]],
            "loss when cut, not trained on": runs.cut.loss,
            "loss of the larger model": runs.teacher.loss,
        },
        control={
            f"loss at {step} steps, from scratch": early["random"],
            "loss at the end, from scratch": control,
            "loss at the end by seed, from scratch": [score.loss for score in runs.scores["random"]],
        },
        note=_note(lab),
    )


@paper.claim(
    "Taught by the larger model's likeliest tokens, the pruned model says more tokens right, at no higher loss",
    paper="The on-device recipe: targets that are 0.9 the teacher's top-1 prediction; about 5% on MMLU",
    control="the pruned model on labels alone, same windows and steps",
)
def top1_distillation_helps(lab: Lab) -> Verdict:
    """Train the pruned model on the mixed target, and compare accuracy, loss, and loss after one temperature."""
    runs = _runs(lab)
    values = {(arm, what): _mean(runs, arm, what) for arm in HARD for what in ("accuracy", "loss", "tempered")}
    lab.table(
        "Two seeds, means",
        ["model", "said right", "nats", "nats after one temperature"],
        [["larger", runs.teacher.accuracy, runs.teacher.loss, runs.teacher.tempered]]
        + [[ARMS[arm], *(_mean(runs, arm, what) for what in ("accuracy", "loss", "tempered"))] for arm in ARMS],
    )
    return lab.judge(
        checks={
            "it says at least as many right": values["distilled", "accuracy"] >= values["labels", "accuracy"],
            "its loss is no higher": values["distilled", "loss"] <= values["labels", "loss"],
            "nor is it after one temperature": values["distilled", "tempered"] <= values["labels", "tempered"],
        },
        measured={
            "said right, distilled": values["distilled", "accuracy"],
            "loss, distilled": values["distilled", "loss"],
            "loss after one temperature, distilled": values["distilled", "tempered"],
            "said right by seed, distilled": [score.accuracy for score in runs.scores["distilled"]],
            "said right, the larger model": runs.teacher.accuracy,
            "said right, when cut": runs.cut_hard.accuracy,
        },
        control={
            "said right, labels alone": values["labels", "accuracy"],
            "loss, labels alone": values["labels", "loss"],
            "loss after one temperature, labels alone": values["labels", "tempered"],
            "said right by seed, labels alone": [score.accuracy for score in runs.scores["labels"]],
        },
        note=(
            "The mixed target is least at q = 0.1 p + 0.9 on the teacher's likeliest token, so a student that learns "
            "it gives every other character a tenth of its probability, which costs log 10 nats wherever something "
            "else comes: loss on labels cannot be what improves, answers chosen by the likeliest token can. A first "
            "design taught the model with half of its units, which was as good as the larger one (1.835 and 1.834 "
            "nats), so that there was nothing to teach: 0.4551 right with the mixed target, 0.4589 on labels alone, "
            "2.74 and 1.84 nats. Here a sixteenth is left. " + _note(lab)
        ),
    )


def _note(lab: Lab) -> str:
    depth, dim, hidden = SIZES[lab.scale]
    return (
        f"{depth} layers, width {dim}, {hidden} hidden units, {hidden // 2} or {hidden // 16} when cut; peak rate "
        f"{LR}; masks are learned with all weights frozen; nats a character on the last tenth of tinyshakespeare."
    )


def _draw(lab: Lab, runs: Runs) -> None:
    with lab.figure("students", figsize=(8.4, 3.6)) as figure:
        axes = figure.subplots(1, 2)
        shown = (("random", CONTROL, 0), ("pruned", COLORS[0], 0), ("labels", CONTROL, 1), ("distilled", COLORS[1], 1))
        for name, color, place in shown:
            for number, curve in enumerate(runs.curves[name]):
                steps, values = [each[0] for each in curve], [each[1 + place] for each in curve]
                label = ARMS[name].partition(", ")[2] if not number else None
                axes[place].plot(steps, values, color=color, marker="o", markersize=4, label=label)
        for place, level in enumerate((runs.teacher.loss, runs.teacher.accuracy)):
            axes[place].axhline(level, color=FAINT, linestyle=":", label="the larger model")
        axes[0].set(title="Half of the hidden units", xlabel="steps", ylabel="nats a character, held out")
        axes[1].set(title="A sixteenth of them", xlabel="steps", ylabel="characters said right, held out")
        axes[0].legend(loc="upper right")
        axes[1].legend(loc="lower right")
