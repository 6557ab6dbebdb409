"""Lion: an optimizer found by search, which moves every weight by the same amount, up or down."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paperworks import train
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.testbeds.characters import BATCH, LENGTH, character_llama, held_out_loss, play
from paperworks.testbeds.training import fit
from paperworks.train.optim.optimizer import OptimizerSpec

paper = Paper(
    key="lion",
    title="Symbolic Discovery of Optimization Algorithms",
    authors="Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le",
    year=2023,
    ref="arXiv:2302.06675",
    family="training",
    summary=(
        "Lion, found by searching programs, takes the sign of a blend of the gradient and its running mean: one state "
        "for each weight instead of AdamW's two, at a smaller rate and a larger decay."
    ),
    implements=("paperworks.train.optim.lion.Lion",),
    equation=(
        r"w \leftarrow w - \eta \left(\operatorname{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda w\right), "
        r"\quad m \leftarrow \beta_2 m + (1 - \beta_2) g"
    ),
    usage="""
import torch
from paperworks import train

model = torch.nn.Linear(8, 1)
x = torch.randn(64, 8)
settings = train.Settings(steps=50, lr=1e-2, optimizer=train.Lion(weight_decay=0.1), save_every=None)
report = train.fit(model, lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean(), [x] * 50, settings)
print("loss:", report.losses[0], "->", report.losses[-1])
""",
    notes="The paper's gains are on images, and on language models of 1.1 to 7.5 billion parameters; here a model of "
    "characters has a few hundred steps.",
)

RATES = {"Lion": 1e-3, "AdamW": 3e-3, "sign of the gradient": 1e-3}  # the paper: a third to a tenth of AdamW's
DECAYS = {"Lion": 0.3, "AdamW": 0.1, "sign of the gradient": 0.3}  # rate times decay alike


@paper.claim(
    "Every weight moves by the rate, whatever its gradient, and one number is kept for each",
    paper="Algorithm 2; Section 3.2: half of AdamW's memory, a uniform magnitude of updates",
    kind="exact",
    control="AdamW, which keeps two numbers and moves weights unequally",
)
def moves_by_the_rate(lab: Lab) -> Verdict:
    """Take two steps from the equations in float64 and by the optimizer; count what is kept."""
    draws = lab.generator(lab.seed)
    start, first, second = (torch.randn(100, dtype=torch.float64, generator=draws) for _ in range(3))
    lr, decay, (b1, b2) = 0.01, 0.1, (0.9, 0.99)
    weight = torch.nn.Parameter(start.clone())
    optimizer = train.Lion(betas=(b1, b2)).build([{"params": [weight], "lr": lr, "weight_decay": decay}])
    written, mean = start.clone(), torch.zeros_like(start)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        written = written - lr * (torch.sign(b1 * mean + (1 - b1) * gradient) + decay * written)
        mean = b2 * mean + (1 - b2) * gradient
    kept = {name: _numbers_kept(choice, start) for name, choice in (("Lion", train.Lion()), ("AdamW", train.AdamW()))}
    moved = _moves(train.Lion(), start, first, lr)
    unequal = _moves(train.AdamW(weight_decay=0.0), start, first + 1e-8 * second, lr)
    apart = float((weight.detach() - written).abs().max())
    return lab.judge(
        checks={
            "two steps are the equations, to 1e-15": apart < 1e-15,
            "every weight moves by the rate, to 1e-15": float((moved - lr).abs().max()) < 1e-15,
            "one number a weight is kept": kept["Lion"] == 1,
            "AdamW keeps two": kept["AdamW"] == 2,
        },
        measured={"largest difference from the equations": apart, "numbers kept for a weight": kept["Lion"]},
        control={"numbers kept for a weight": kept["AdamW"], "largest move / rate": float(unequal.max() / lr)},
    )


def _numbers_kept(choice: OptimizerSpec, start: torch.Tensor) -> int:
    weight = torch.nn.Parameter(start.clone())
    optimizer = choice.build([{"params": [weight], "lr": 0.01, "weight_decay": 0.0}])
    weight.grad = torch.ones_like(start)
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[weight].values() if value.dim()) // start.numel()


def _moves(choice: OptimizerSpec, start: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
    weight = torch.nn.Parameter(start.clone())
    optimizer = choice.build([{"params": [weight], "lr": lr, "weight_decay": 0.0}])
    weight.grad = gradient.clone()
    optimizer.step()
    return (weight.detach() - start).abs()


@paper.claim(
    "It learns text as well as AdamW with half of its memory, and by its running mean",
    paper="Abstract: similar or better than Adafactor and AdamW on language modelling; Section 3.2: the momentum's "
    "role",
    control="the sign of the gradient alone (both betas 0); AdamW at its own rate and decay",
    reach="real",
)
def learns_text(lab: Lab) -> Verdict:
    """Train a character model with each, equal steps, and compare held-out losses."""
    play()
    steps = lab.pick(smoke=2, small=300, large=3000)
    spec = character_llama(depth=lab.pick(smoke=1, small=2))
    choices = {
        "Lion": train.Lion(weight_decay=DECAYS["Lion"]),
        "sign of the gradient": train.Lion(betas=(0.0, 0.0), weight_decay=DECAYS["sign of the gradient"]),
        "AdamW": train.AdamW(betas=(0.9, 0.95), weight_decay=DECAYS["AdamW"]),
    }

    def arm(name: str) -> Callable[[int], dict[str, float | list[float]]]:
        def measures(seed: int) -> dict[str, float | list[float]]:
            model = spec.build()
            batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=seed)
            rate = RATES[name]
            with lab.threads(1):
                losses = fit(
                    model, train.next_token_loss, batches, steps=steps, lr=rate, seed=seed,
                    optimizer=choices[name], warmup=0.1,
                )  # fmt: skip
            return {
                "held-out loss": held_out_loss(lab, model.eval()),
                "numbers kept for a weight": _numbers_kept(choices[name], torch.zeros(10)),
                "training loss": losses,
            }

        return measures

    verdict = lab.compare(
        arms={name: arm(name) for name in choices},
        main=Beats("Lion", "sign of the gradient", on="held-out loss", by=0.05, lower=True),
        also=[
            Within("Lion", "AdamW", on="held-out loss", by=0.03, lower=True),
            AtMost("Lion", 1, on="numbers kept for a weight"),
        ],
        seeds=3,
        note=f"Two layers of width 64, {steps} steps of 1,024 characters of tinyshakespeare; rates "
        + ", ".join(f"{rate:g} ({name})" for name, rate in RATES.items())
        + "; nats a character on the last tenth.",
    )
    lab.curves("training loss", name="training", title="Training loss, nats a character")
    return verdict
