"""A base model's autoencoder on its fine-tuned descendants, and on the same model turned around."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from paperworks import train
from paperworks.interpret.sae.evaluation.transfer import (
    Transfer,
    gap_closed,
    random_rotation,
    rotate_autoencoder,
    rotate_stream,
    transfer_table,
)
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.papers.autoencoders.sae_transfer.dialogue_models import (
    STEPS,
    TAP,
    TUNINGS,
    K,
    dialogue_models,
    fitted,
    rows_of,
)

paper = Paper(
    key="sae-transfer",
    title="SAEs (usually) Transfer Between Base and Chat Models",
    authors="Kissane, Krzyzanowski, Conmy, Nanda",
    year=2024,
    ref="alignmentforum.org/posts/fmwk6qxrpW8d4jvbd",
    family="autoencoders",
    summary=(
        "Fine-tuning to dialogue leaves a model's features nearly where they were: an autoencoder of the base model "
        "reconstructs the chat model's activations almost as well as one of its own, and a little more training closes "
        "the gap. Turning the residual stream, which changes nothing the model does, breaks it entirely."
    ),
    implements=(
        "paperworks.interpret.sae.evaluation.transfer.transfer_table",
        "paperworks.interpret.sae.evaluation.transfer.rotate_stream",
        "paperworks.interpret.sae.evaluation.transfer.rotate_autoencoder",
    ),
    equation=r"\text{recovered} = \frac{\mathcal{L}(\bar x) - \mathcal{L}(\mathrm{SAE}(x))}"
    r"{\mathcal{L}(\bar x) - \mathcal{L}(x)}, \qquad h \to Q h: \; W_\mathrm{enc} \to W_\mathrm{enc} Q^\top",
    usage="""
import torch
from paperworks import train
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.transfer import transfer_table
from paperworks.testbeds.induction_model import repeated, untrained

base, chat = untrained(seed=0), untrained(seed=1)  # any two models with one tap
own = sae.TopK(latents=128, k=4).build(64)         # an autoencoder of the base's activations
tokens = repeated(4, 12, 2, torch.Generator().manual_seed(0))
batches = [{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}]
table = transfer_table({"base": base, "chat": chat}, {"own": own}, "blocks.0", batches, train.next_token_loss)
for (autoencoder, model), cell in table.cells.items():
    print(autoencoder, "on", model, "FVU", cell.fvu, "recovered", cell.recovered_over_mean)
""",
    notes=(
        "A character model of four blocks and its descendants tuned to dialogue, instead of Mistral-7B and its chat "
        "model. By FVU transfer is worse than by loss: on so small a model four latents explain 97%, so that what "
        "moved is a large part of what is left. Zeros in the stream cost more than knowing nothing, so what is "
        "recovered is told against the mean."
    ),
)

SHARE = 0.1  # of an autoencoder's steps, to fine-tune it


@dataclass(frozen=True)
class Table:
    """Cells of each autoencoder on each descendant, by name, those of the turned model, and what tuning did."""

    descendants: list[dict[str, Transfer]]
    turned: dict[str, Transfer]
    fallen: float  # least fall of the loss on dialogue by tuning


@cache
def _table(lab: Lab, seed: int) -> Table:
    """Train the models and the autoencoders of a seed, and measure each autoencoder on each model."""
    there = copy.copy(lab)
    there.seed = seed  # which models and text are drawn from
    models = dialogue_models(there)
    base, steps = models.by_name["base"], lab.pick(smoke=10, small=STEPS)
    few = max(2, int(SHARE * steps))
    held_out = models.text.held_out(lab.pick(smoke=2, small=64))
    ours = fitted(there, rows_of(there, models.text, base), steps, seed, "autoencoder, base")
    descendants = []
    for index, name in enumerate(TUNINGS, 1):
        model = models.by_name[name]
        rows = rows_of(there, models.text, model)
        known = {
            "base": ours,
            "own": fitted(there, rows, steps, seed + index, f"autoencoder, {name}"),
            "fine-tuned": fitted(there, rows, few, seed, f"fine-tuned for {name}", start=ours),
            "few steps": fitted(there, rows, few, seed + index, f"few steps, {name}"),
        }
        cells = transfer_table({"it": model}, known, TAP, held_out, train.next_token_loss).cells
        descendants.append({key: cells[key, "it"] for key in known})
    rotation = random_rotation(64, lab.generator(seed))
    around = {"base": ours, "turned": rotate_autoencoder(ours, rotation)}
    cells = transfer_table({"it": rotate_stream(base, rotation)}, around, TAP, held_out, train.next_token_loss).cells
    fallen = min(models.losses["base"][1] - models.losses[name][1] for name in TUNINGS)
    return Table(descendants, {key: cells[key, "it"] for key in around}, fallen)


@paper.claim(
    "A base model's autoencoder serves its fine-tuned descendants, and a tenth of the training closes the gap",
    paper="Mistral-7B and Qwen1.5-0.5B: base autoencoders spliced into chat models cost about what the chat models' "
    "own do, Gemma's do not; fine-tuning on 5M activations matches 800M from scratch",
    control="the same autoencoder on the base model with its residual stream turned by a random rotation, which "
    "computes the same; a tenth of the training from scratch",
)
def transfers_to_descendants(lab: Lab) -> Verdict:
    """Splice the base's, the descendants' own and the fine-tuned autoencoders into two descendants."""

    def arm(key: str, *, turned: bool = False) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            with lab.threads(1):
                table = _table(lab, seed)
            cells = [table.turned[key] if turned else each[key] for each in table.descendants]
            # Against the gap between the base's and the own autoencoder; 1 where there is none.
            closed = [
                gap_closed(each["base"].fvu, cell.fvu, each["own"].fvu) if each["base"].fvu > each["own"].fvu else 1.0
                for each, cell in zip(table.descendants, cells, strict=True)
            ]
            return {
                "loss recovered": min(cell.recovered_over_mean for cell in cells),
                "FVU": max(cell.fvu for cell in cells),
                "share of the gap closed": min(closed),
                "fall of the loss on dialogue by tuning": table.fallen,
            }

        return run

    ours, own, tuned = "base's autoencoder", "descendant's own", "base's, fine-tuned"
    turned, scratch = "base's, on the turned model", "a tenth of the steps from scratch"
    verdict = lab.compare(
        arms={
            ours: arm("base"),
            own: arm("own"),
            tuned: arm("fine-tuned"),
            turned: arm("base", turned=True),
            scratch: arm("few steps"),
        },
        main=Beats(ours, turned, on="loss recovered", by=0.4),
        also=[
            Within(ours, own, on="loss recovered", by=0.05, lower=False),
            Within(ours, own, on="FVU", by_ratio=0.3, lower=True),
            AtLeast(tuned, 0.7, on="share of the gap closed"),
            Beats(tuned, scratch, on="FVU", lower=True),
            AtMost(turned, 0.1, on="loss recovered"),
            AtLeast(ours, 0.1, on="fall of the loss on dialogue by tuning"),
        ],
        seeds=2,
        note=f"One token a character, four blocks of 64 dimensions, after the second; TopK, {K} of 256 latents, "
        f"{STEPS:,} steps. Descendants: all weights tuned, and a LoRA merged; numbers are those of the worse one. All "
        "autoencoders see the same text, half plain and half dialogue, so that only the model differs. The first "
        "position is left out and passes the splice. Recovered against the mean. The turned model is not lost "
        "entirely, for of 256 latents in 64 dimensions some lie near any direction by chance.",
    )
    lab.points("loss recovered", name="transfer", title="Loss recovered, worse of two descendants")
    return verdict


@paper.claim(
    "Between identical models nothing is lost; a rotated model is described worse than by its mean, until the "
    "autoencoder is turned as well",
    paper="The control of a transfer: the same function in another basis",
    kind="exact",
)
def rotation_is_exact(lab: Lab) -> Verdict:
    """Turn a model's stream in float64, and compare logits, reconstructions and recovered loss."""
    models = dialogue_models(lab)
    base = copy.deepcopy(models.by_name["base"]).double()
    rotation = random_rotation(64, torch.Generator().manual_seed(lab.seed + 4))
    turned, back = rotate_stream(base, rotation), rotate_stream(rotate_stream(base, rotation), rotation.T)
    rows = rows_of(lab, models.text, models.by_name["base"])
    steps = lab.pick(smoke=10, small=600)
    autoencoder = fitted(lab, rows, steps, lab.seed, "autoencoder, base").double()
    held_out = models.text.held_out(lab.pick(smoke=2, small=32))
    tokens = held_out[0]["tokens"]
    with torch.no_grad():
        logits = base(tokens)
        same, again = ((model(tokens) - logits).abs().max().item() for model in (turned, back))
    table = transfer_table(
        {"model": base, "its copy": copy.deepcopy(base), "turned": turned},
        {"as it is": autoencoder, "turned": rotate_autoencoder(autoencoder, rotation)},
        TAP,
        held_out,
        train.next_token_loss,
    )
    cells = table.cells
    own, copied, raw = (cells["as it is", name] for name in ("model", "its copy", "turned"))
    exact = cells["turned", "turned"]
    return lab.judge(
        checks={
            "the turned model's logits are the same, to 1e-9": same < 1e-9,
            "turned back it is the model, to 1e-9": again < 1e-9,
            "on an identical model nothing is lost": own == copied,
            "on the turned model the autoencoder is worse than the mean, FVU above 1": raw.fvu > 1,
            "the turned autoencoder is exact on it, to 1e-9": abs(exact.fvu - own.fvu) < 1e-9
            and abs(exact.spliced.spliced - own.spliced.spliced) < 1e-9
            and exact.l0 == own.l0,
        },
        measured={
            "largest difference of logits": same,
            "after turning back": again,
            "FVU and recovered, own": [own.fvu, own.recovered_over_mean],
            "on the turned model": [raw.fvu, raw.recovered_over_mean],
            "on the turned model, turned": [exact.fvu, exact.recovered_over_mean],
        },
    )
