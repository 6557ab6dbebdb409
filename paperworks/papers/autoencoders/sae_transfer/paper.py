"""A base model's autoencoder on its fine-tuned descendants, and on the same model turned around."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from paperworks import train
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.transfer import (
    TransferTable,
    decoder_cosines,
    gap_closed,
    random_rotation,
    rotate_autoencoder,
    rotate_stream,
    transfer_table,
)
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.papers.autoencoders.sae_transfer.dialogue_models import (
    STEPS,
    TAP,
    TUNINGS,
    Corpora,
    K,
    Models,
    Rows,
    dialogue_models,
    fitted,
    rows_of,
    share_moved,
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
        "paperworks.interpret.sae.evaluation.transfer.decoder_cosines",
        "paperworks.interpret.sae.evaluation.transfer.rotate_stream",
        "paperworks.interpret.sae.evaluation.transfer.rotate_autoencoder",
    ),
)

SHARE = 0.1  # of an autoencoder's steps, to fine-tune it
USUAL = ("full", "LoRA")
OTHERS = (2, 8)  # latents on, to see what the ratio depends on


@dataclass(frozen=True)
class Descent:
    """What the base model's autoencoder does on one descendant, beside the descendant's own."""

    table: TransferTable
    closed: float  # share of the gap in FVU that fine-tuning the autoencoder closes; 1 where there is none
    cosine: float  # of decoder rows before and after, mean
    moved: float  # mean ||change of x||^2, as a share of the base activations' variance

    def fvu(self, autoencoder: str, model: str = "tuned") -> float:
        """Return one cell's FVU."""
        return self.table.cells[autoencoder, model].fvu

    def recovered(self, autoencoder: str, model: str = "tuned") -> float:
        """Return one cell's share of the loss recovered, against the mean."""
        return self.table.cells[autoencoder, model].recovered_over_mean

    @property
    def pair(self) -> tuple[float, float]:
        """Return the FVU of the base's and of the descendant's own autoencoder on the descendant."""
        return self.fvu("base"), self.fvu("own")

    @property
    def ratio(self) -> float:
        """Return by how much the foreign FVU is larger than the own."""
        return self.fvu("base") / self.fvu("own")


def _pairs(lab: Lab, models: Models, base_rows: Rows, k: int) -> list[tuple[float, float]]:
    """Return each usual descendant's `pair` for autoencoders with k latents on."""
    steps, found = lab.pick(smoke=10, small=STEPS), []
    ours = fitted(lab, base_rows, steps, lab.seed, f"autoencoder, base, k = {k}", k=k)
    for index, name in enumerate(USUAL, 1):
        model = models.by_name[name]
        own = fitted(lab, rows_of(lab, models.text, model), steps, lab.seed + index, f"{name}, k = {k}", k=k)
        cells = _table(lab, models.text, {"tuned": model}, {"base": ours, "own": own}).cells
        found.append((cells["base", "tuned"].fvu, cells["own", "tuned"].fvu))
    return found


def _table(
    lab: Lab, text: Corpora, models: dict[str, DecoderModel], autoencoders: dict[str, sae.SparseAutoencoder]
) -> TransferTable:
    held_out = text.held_out(lab.pick(smoke=2, small=128))
    with lab.threads(1), lab.progress("the table", len(models) * len(autoencoders)) as advance:
        return transfer_table(models, autoencoders, TAP, held_out, train.next_token_loss, on_each=lambda: advance(1))


@paper.claim(
    "A base model's autoencoder serves its fine-tuned descendants, and a tenth of the training closes the gap",
    paper="Mistral-7B and Qwen1.5-0.5B: base autoencoders spliced into chat models cost about what the chat models' "
    "own do, Gemma's do not; fine-tuning on 5M activations matches 800M from scratch",
    control="the same model with its residual stream turned by a random rotation, which computes the same",
)
def transfers_to_descendants(lab: Lab) -> Verdict:
    """Fill the table of autoencoders and models, then fine-tune the base one for each descendant."""
    models = dialogue_models(lab)
    base = models.by_name["base"]
    steps = lab.pick(smoke=10, small=STEPS)
    few = max(2, int(SHARE * steps))
    base_rows = rows_of(lab, models.text, base)
    ours = fitted(lab, base_rows, steps, lab.seed, "autoencoder, base")
    descents: dict[str, Descent] = {}
    for index, name in enumerate(TUNINGS, 1):
        rows = rows_of(lab, models.text, models.by_name[name])
        tuned = fitted(lab, rows, few, lab.seed, f"fine-tuned for {name}", start=ours)
        known = {
            "base": ours,
            "own": fitted(lab, rows, steps, lab.seed + index, f"autoencoder, {name}"),
            "fine-tuned": tuned,
            "few steps": fitted(lab, rows, few, lab.seed + index, f"few steps, {name}"),
        }
        table = _table(lab, models.text, {"base": base, "tuned": models.by_name[name]}, known)
        foreign, own = (table.cells[key, "tuned"].fvu for key in ("base", "own"))
        closed = gap_closed(foreign, table.cells["fine-tuned", "tuned"].fvu, own) if foreign > own else 1.0
        moved = share_moved(lab, models.text, base, models.by_name[name])
        descents[name] = Descent(table, closed, float(decoder_cosines(ours, tuned).mean()), moved)
    sweep = {K: [descents[name].pair for name in USUAL]}
    for k in lab.pick(smoke=OTHERS[:1], small=OTHERS):
        sweep[k] = _pairs(lab, models, base_rows, k)
    rotation = random_rotation(64, torch.Generator().manual_seed(lab.seed))
    around = _table(
        lab,
        models.text,
        {"base": base, "turned": rotate_stream(base, rotation)},
        {"base": ours, "turned": rotate_autoencoder(ours, rotation)},
    )
    lab.table(
        "Each autoencoder on each model",
        ["descendant", "autoencoder", "model", "L0", "FVU", "loss", "loss spliced", "recovered, zeros", "and mean"],
        [
            [
                *(descendant, autoencoder, model, cell.l0, cell.fvu, cell.spliced.clean, cell.spliced.spliced),
                *(cell.spliced.recovered, cell.recovered_over_mean),
            ]
            for descendant, table in [*((name, one.table) for name, one in descents.items()), ("turned", around)]
            for (autoencoder, model), cell in table.cells.items()
        ],
    )
    _draw(lab, descents, around, sweep)
    usual = [descents[name] for name in USUAL]
    raw, turned, native = (around.cells[key] for key in (("base", "turned"), ("turned", "turned"), ("base", "base")))
    fallen = [models.losses["base"][1] - models.losses[name][1] for name in TUNINGS]
    return lab.judge(
        checks={
            "the base autoencoder recovers as much of a descendant's loss as its own, to 0.05": max(
                one.recovered("own") - one.recovered("base") for one in usual
            )
            < 0.05,
            "its FVU is below 1.3 times the descendant's own": max(one.ratio for one in usual) < 1.3,
            "a tenth of the steps closes more than 70% of the gap": min(one.closed for one in usual) > 0.7,
            "on the turned model its FVU is above 1": raw.fvu > 1,
            "and it recovers less than 0.1": raw.recovered_over_mean < 0.1,
            "turned likewise it is as good as it was, to 1e-3": abs(turned.fvu - native.fvu) < 1e-3
            and abs(turned.spliced.recovered - native.spliced.recovered) < 1e-3,
            "tuning changed the models: the loss on dialogue fell by more than 0.1": min(fallen) > 0.1,
        },
        measured={
            "descendants": list(TUNINGS),
            "FVU of base and own autoencoder": [[one.fvu("base"), one.fvu("own")] for one in descents.values()],
            "ratio": [one.ratio for one in descents.values()],
            "FVU of base and own with more or fewer latents on": [[k, *map(list, sweep[k])] for k in sorted(sweep)],
            "share of the gap closed": [one.closed for one in descents.values()],
            "loss recovered by base and own, against the mean": [
                [one.recovered("base"), one.recovered("own")] for one in descents.values()
            ],
            "reconstructions too short by, base and own": [
                [one.table.cells[key, "tuned"].scale for key in ("base", "own")] for one in descents.values()
            ],
            "cosine of decoder rows before and after fine-tuning, mean": [one.cosine for one in descents.values()],
            "how far activations moved, share of their variance": [one.moved for one in descents.values()],
            "loss on plain text and dialogue, base first": [list(one) for one in models.losses.values()],
            "outlier positions, share": [one.table.outliers["tuned"].share for one in descents.values()],
            "FVU of the descendant's autoencoder on the base, and of the base's": [
                [one.fvu("own", "base"), one.fvu("base", "base")] for one in descents.values()
            ],
        },
        control={
            "on the turned model: FVU, recovered against the mean, against zeros": [
                raw.fvu,
                raw.recovered_over_mean,
                raw.spliced.recovered,
            ],
            "turned likewise": [turned.fvu, turned.recovered_over_mean, turned.spliced.recovered],
            "a tenth of the steps from scratch, FVU": [one.fvu("few steps") for one in descents.values()],
        },
        note=f"{models.text.words}; one token a character, four blocks of 64 dimensions, after the second. All "
        f"autoencoders (TopK, {K} of 256 latents) see the same text, half plain and half dialogue, so that only "
        "the model differs. The first position is left out and passes the splice. The checks are of the first two "
        "descendants; the third is tuned as no chat model is (a third of the base model's steps at a third of its "
        "rate). By FVU transfer is worse than by loss: a foreign autoencoder leaves half or more of the variance "
        "that moved unexplained, whatever its own error, and on so small a model four latents explain 97%, so "
        "that the ratio is large; with two latents it is smaller. The turned model is not lost entirely, for of 256 "
        "latents in 64 dimensions some lie near any direction by chance. Zeros in the stream cost more than knowing "
        "nothing, so what is recovered is told against the mean.",
    )


def _draw(
    lab: Lab, descents: dict[str, Descent], around: TransferTable, sweep: dict[int, list[tuple[float, float]]]
) -> None:
    with lab.figure("transfer", figsize=(10.4, 3.5)) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(5, 3, 4))
        kinds = {"base model's": "base", "base's, fine-tuned": "fine-tuned", "its own": "own"}
        for index, (label, key) in enumerate(kinds.items()):
            places = [place + 0.26 * (index - 1) for place in range(len(descents))]
            values = [one.fvu(key) for one in descents.values()]
            left.bar(places, values, width=0.24, color=COLORS[index], label=label)
        native = around.cells["base", "base"].fvu
        left.axhline(native, color=CONTROL, linewidth=1, linestyle=":", label="on the base model")
        left.set_xticks(range(len(descents)), [f"{name}\n{one.moved:.1%} moved" for name, one in descents.items()])
        left.set_ylim(0, 1.55 * max(one.fvu("base") for one in descents.values()))
        left.legend(loc="upper left", fontsize=8, ncols=2)
        left.set_title("FVU on the descendant")
        bars = {
            "base": around.cells["base", "base"],
            **{name: one.table.cells["base", "tuned"] for name, one in descents.items()},
            "turned": around.cells["base", "turned"],
            "turned,\nturned": around.cells["turned", "turned"],
        }
        for index, name in enumerate(USUAL):
            ratios = [pairs[index][0] / pairs[index][1] for _, pairs in sorted(sweep.items())]
            middle.plot(range(len(ratios)), ratios, marker="o", color=COLORS[3 + index], label=name)
        middle.axhline(1.3, color=INK, linewidth=0.8, linestyle=":")
        middle.set_xticks(range(len(sweep)), [str(k) for k in sorted(sweep)])
        middle.set_xlabel("latents on")
        middle.set_ylim(bottom=1)
        middle.set_title("Base's FVU / own")
        middle.legend(loc="upper left", fontsize=8)
        colors = [COLORS[0]] * (1 + len(descents)) + [CONTROL] * 2
        heights = [cell.recovered_over_mean for cell in bars.values()]
        right.bar(range(len(bars)), heights, color=colors, width=0.6)
        right.axhline(0, color=INK, linewidth=0.8)
        right.set_xticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars], fontsize=8)
        right.set_title("Loss it recovers")


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
