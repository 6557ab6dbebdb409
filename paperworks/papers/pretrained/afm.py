"""AFM: a small model is pruned out of a larger one by learned masks, then taught by its likeliest tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from paperworks import train
from paperworks.compress.pruning.soft_topk import annealed, kept_units, mask_hidden_units, set_temperature
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.models import Decoder, DecoderModel, count_parameters
from paperworks.models.presets.afm import afm, afm_on_device
from paperworks.models.surgery.pruning import keep_hidden_units
from paperworks.nn.feedforward.mlp import GatedMLPModule
from paperworks.testbeds.characters import BATCH, LENGTH, LR, play
from paperworks.testbeds.training import fit
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
    equation=r"\nabla = 0.1 (p - y) + 0.9 (p - \operatorname{onehot}(\arg\max_j t_j))",
    usage="""
import torch
from paperworks.compress.pruning.soft_topk import kept_units, mask_hidden_units, set_temperature
from paperworks.models import count_parameters
from paperworks.models.presets.afm import afm
from paperworks.models.surgery.pruning import keep_hidden_units

model = afm(32, 2, 4, 64, kv_heads=2, head_dim=8, vocab_size=50).build()
masks = mask_hidden_units(model, keep=0.5)  # train their scores, with a falling temperature
set_temperature(masks, 0.0)
smaller = keep_hidden_units(model, kept_units(masks))
print(count_parameters(model), "->", count_parameters(smaller))
""",
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
    draws = lab.generator(lab.seed)
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


SIZES = {"smoke": (1, 16, 32), "small": (3, 64, 256), "large": (6, 128, 512)}  # layers, width, hidden units


def _fit(lab: Lab, model: DecoderModel, loss: Loss, steps: int, seed: int, **options: Any) -> None:
    """Train by the recipe of the small models: AdamW, decay 0.1, a tenth of warm-up, cosine to a tenth."""
    batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=seed)
    adam = train.AdamW(betas=(0.9, 0.95), weight_decay=0.1)
    with lab.threads(1):
        fit(model, loss, batches, steps=steps, seed=seed, optimizer=adam, warmup=0.1, **{"lr": LR} | options)


def _spec(lab: Lab) -> Decoder:
    depth, dim, hidden = SIZES[lab.scale]
    return afm(dim, depth, 4, hidden, kv_heads=2, head_dim=dim // 4, vocab_size=play().tokenizer.vocab_size)


_TEACHERS: dict[tuple[str, int], DecoderModel] = {}  # both claims begin from the same


def _teacher(lab: Lab, seed: int) -> DecoderModel:
    if (lab.scale, seed) not in _TEACHERS:
        model = _TEACHERS[lab.scale, seed] = _spec(lab).build()
        _fit(lab, model, train.next_token_loss, lab.pick(smoke=2, small=500, large=4000), seed)
    return _TEACHERS[lab.scale, seed]


def _pruned(lab: Lab, teacher: DecoderModel, keep: float, seed: int) -> DecoderModel:
    """Learn masks for a share of the hidden units with all weights frozen, and cut the others out."""
    steps = lab.pick(smoke=2, small=60, large=300)
    masked = copy.deepcopy(teacher).requires_grad_(False)
    masks = mask_hidden_units(masked, keep=keep)

    def cool(step: int) -> None:
        set_temperature(masks, annealed(step, steps))

    # scores begin at 0 and must come to differ by more than the last temperatures: a tenth a step does that
    _fit(lab, masked, train.next_token_loss, steps, 1000 + seed, on_step=cool, lr=0.1)
    return keep_hidden_units(masked, kept_units(masks)).requires_grad_(True)


@torch.no_grad()
def _score(lab: Lab, model: DecoderModel) -> dict[str, float]:
    batches = play().held_out_windows(length=LENGTH, count=lab.pick(smoke=4, small=512))
    with lab.threads(1):
        logits = torch.cat([model.eval()(batch["tokens"]).flatten(0, 1) for batch in batches])
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    return {
        "held-out loss": float(F.cross_entropy(logits, targets)),
        "said right": float((logits.argmax(-1) == targets).double().mean()),
    }


@paper.claim(
    "A model pruned by learned soft top-k masks starts ahead of one from scratch, and stays ahead",
    paper="The on-device recipe: starting from a pruned 6.4B model, and distillation, improve over training anew",
    control="the same small model from random weights, on the same windows for as many steps",
    reach="real",
)
def pruning_is_a_start(lab: Lab) -> Verdict:
    """Halve the hidden units of a trained model; train what is left, and a new model of its size."""
    play()
    early, steps = lab.pick(smoke=(1, 2), small=(25, 120), large=(100, 1000))

    def arm(start: Callable[[DecoderModel, int], DecoderModel]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model, seen = start(_teacher(lab, seed), seed), dict[str, float]()

            def look(step: int) -> None:
                if step == early:
                    seen[f"loss after {early} steps"] = _score(lab, model)["held-out loss"]
                    model.train()

            _fit(lab, model, train.next_token_loss, steps, 2000 + seed, on_step=look)
            return seen | {"loss at the end": _score(lab, model)["held-out loss"]}

        return measures

    def cut(teacher: DecoderModel, seed: int) -> DecoderModel:
        return _pruned(lab, teacher, 1 / 2, seed)

    def scratch(teacher: DecoderModel, seed: int) -> DecoderModel:
        return cut(teacher, seed).spec.build()

    verdict = lab.compare(
        arms={"pruned": arm(cut), "from scratch": arm(scratch)},
        main=Beats("pruned", "from scratch", on="loss at the end", by=0.05, lower=True),
        also=[Beats("pruned", "from scratch", on=f"loss after {early} steps", by=0.05, lower=True)],
        seeds=2,
        note=_note(lab),
    )
    lab.points("loss at the end", name="students", title=f"Nats a character after {steps} further steps")
    return verdict


@paper.claim(
    "Taught by the larger model's likeliest tokens, the pruned model says more tokens right, at no higher loss",
    paper="The on-device recipe: targets that are 0.9 the teacher's top-1 prediction; about 5% on MMLU",
    control="the pruned model on labels alone, same windows and steps",
    reach="real",
)
def top1_distillation_helps(lab: Lab) -> Verdict:
    """Train a model pruned to a sixteenth on the mixed target and on labels; compare accuracy and loss."""
    play()
    steps = lab.pick(smoke=2, small=100, large=500)

    @cache
    def start(seed: int) -> DecoderModel:
        return _pruned(lab, _teacher(lab, seed), 1 / 16, seed)

    def arm(loss: Callable[[DecoderModel], Loss]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = copy.deepcopy(start(seed))
            _fit(lab, model, loss(_teacher(lab, seed)), steps, 3000 + seed)
            return _score(lab, model)

        return measures

    verdict = lab.compare(
        arms={"distilled": arm(Top1Distillation), "labels alone": arm(lambda teacher: train.next_token_loss)},
        main=Beats("distilled", "labels alone", on="said right", by=0.005),
        also=[Within("distilled", "labels alone", on="held-out loss", by=0.02, lower=True)],
        seeds=2,
        note=(
            "The mixed target is least at q = 0.1 p + 0.9 on the teacher's likeliest token, so a student that learns "
            "it gives every other character a tenth of its probability, which costs log 10 nats wherever something "
            "else comes: loss on labels cannot be what improves, answers chosen by the likeliest token can. A first "
            "design taught the model with half of its units, which was as good as the larger one, so that there was "
            "nothing to teach. " + _note(lab)
        ),
    )
    lab.points("said right", name="distilled", title="Characters said right, held out")
    return verdict


def _note(lab: Lab) -> str:
    depth, dim, hidden = SIZES[lab.scale]
    return (
        f"{depth} layers, width {dim}, {hidden} hidden units, {hidden // 2} or {hidden // 16} when cut; peak rate "
        f"{LR}; masks are learned with all weights frozen; nats a character on the last tenth of tinyshakespeare."
    )
