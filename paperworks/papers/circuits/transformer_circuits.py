"""A mathematical framework for transformer circuits: attention read as two small matrices a head."""

from __future__ import annotations

import torch
from torch import Tensor

from paperworks.interpret.circuits import circuits
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.testbeds import induction_model as small

paper = Paper(
    key="transformer-circuits",
    title="A Mathematical Framework for Transformer Circuits",
    authors="Elhage, Nanda, Olsson, Henighan, Joseph, Mann et al.",
    year=2021,
    ref="transformer-circuits.pub/2021/framework",
    family="circuits",
    summary=(
        "A head is two matrices of low rank: where it looks (QK) and what it writes (OV). An attention-only model is a "
        "sum over paths through heads, and heads of two layers compose; keys read by K-composition make induction "
        "heads."
    ),
    implements=(
        "paperworks.interpret.circuits.circuits.Factored",
        "paperworks.interpret.circuits.circuits.full_ov",
        "paperworks.interpret.circuits.circuits.full_qk",
        "paperworks.interpret.circuits.circuits.copying_score",
        "paperworks.interpret.circuits.circuits.composition_scores",
        "paperworks.interpret.circuits.circuits.path_expansion",
    ),
)


@paper.claim(
    "The logits of an attention-only model are a sum over paths, and its large matrices are known by small ones",
    paper="Sections 'Path expansion', 'Eigenvalue analysis': direct path, single heads and virtual heads; the "
    "vocabulary-sized circuits have rank at most head_dim",
    kind="exact",
)
def paths_add_up(lab: Lab) -> Verdict:
    """Expand the trained model into 25 paths, and compare factored norms and eigenvalues with dense ones."""
    model = small.training(lab).model
    tokens = small.repeated(8, small.BLOCK, 2, torch.Generator().manual_seed(lab.seed))
    paths = circuits.path_expansion(model, tokens)
    with torch.no_grad():
        logits = model(tokens)
    apart = (sum(paths.values()) - logits).abs().max().item()
    matrix = circuits.full_ov(model, 1, 0)
    dense = matrix.dense().double()
    large = torch.linalg.eigvals(dense).abs().sort(descending=True).values
    own = matrix.eigenvalues().abs().sort(descending=True).values
    eigen = ((large[: len(own)] - own).abs().max() / large[0]).item()
    norm = abs(matrix.norm().item() / dense.norm().item() - 1)
    answer = tokens[:, small.BLOCK + 1 :, None]
    adds = {
        " then ".join(path) or "direct path": _advantage(x[:, small.BLOCK : -1], answer) for path, x in paths.items()
    }
    lab.table(
        "What the largest paths add to the right token's logit on the second copy, over the mean logit",
        ["path", "logits"],
        sorted(adds.items(), key=lambda item: -abs(item[1]))[:8],
    )
    return lab.judge(
        checks={
            "25 paths add up to the logits, to 1e-3": apart < 1e-3,
            "norms from factors equal dense ones, to 1e-4": norm < 1e-4,
            "eigenvalues of the small matrix are those of the large one, to 1e-3": eigen < 1e-3,
            "and the large one has no others": (large[len(own)] / large[0]).item() < 1e-3,
        },
        measured={
            "paths": len(paths),
            "largest error of the logits": apart,
            "largest logit": logits.abs().max(),
            "relative error of the norm": norm,
            "relative error of the eigenvalues": eigen,
        },
        note="float32.",
    )


def _advantage(logits: Tensor, answer: Tensor) -> float:
    return (logits.gather(-1, answer)[..., 0] - logits.mean(-1)).mean().item()


def _copying(model: DecoderModel) -> list[list[float]]:
    return [
        [circuits.copying_score(circuits.full_ov(model, layer, head)) for head in range(small.HEADS)]
        for layer in range(len(model.blocks))
    ]


@paper.claim(
    "Induction heads copy: all eigenvalues of their OV circuit are positive",
    paper="'Summarizing OV/QK matrices': copying heads have positive eigenvalues; 10 of 12 heads of a one-layer model",
    control="the same heads before training",
)
def induction_heads_copy(lab: Lab) -> Verdict:
    """Compare the copying scores of all heads before and after training on repeated tokens."""
    model, before = small.training(lab).model, small.untrained(seed=lab.seed)
    trained, fresh = _copying(model), _copying(before)
    prefix, _ = small.head_marks(model)
    induction = [head for head in range(small.HEADS) if prefix[1][head] > 0.3]
    _draw_eigenvalues(lab, model, before)
    scores = [trained[1][head] for head in induction]
    largest_fresh = max(abs(score) for layer in fresh for score in layer)
    return lab.judge(
        checks={
            "every induction head scores above 0.5": bool(scores) and min(scores) > 0.5,
            "no head scores above 0.3 either way before training": largest_fresh < 0.3,
            "no head of the first layer copies": max(trained[0]) < 0.3,
        },
        measured={
            "induction heads": [f"1.{head}" for head in induction],
            "their copying scores": scores,
            "first layer": trained[0],
        },
        control={"before training, second layer": fresh[1], "largest of all": largest_fresh},
    )


def _draw_eigenvalues(lab: Lab, model: DecoderModel, before: DecoderModel) -> None:
    with lab.figure("eigenvalues", figsize=(8.8, 3.2)) as figure:
        axes = figure.subplots(1, small.HEADS, sharey=True)
        for head, place in enumerate(axes):
            for source, color, label, marker in ((before, CONTROL, "before", "x"), (model, COLORS[0], "trained", "o")):
                values = circuits.full_ov(source, 1, head).eigenvalues()
                radius = values.abs().max()
                values = values / radius * values.abs().clamp_min(1e-9).pow(-0.5) * radius.sqrt()  # square-root scale
                place.plot(values.real.tolist(), values.imag.tolist(), marker, color=color, ms=5, label=label)
            place.axvline(0, color=INK, linewidth=0.6)
            place.axhline(0, color=INK, linewidth=0.6)
            place.set_xlim(-1.15, 1.15)
            place.set_ylim(-1.15, 1.15)
            place.set_aspect("equal")
            place.set_title(f"head 1.{head}", loc="center")
        axes[0].legend(loc="lower left", fontsize=8)
        figure.suptitle("Eigenvalues of W_E W_OV W_U (root scale): copying is on the right", x=0.01, ha="left")


@paper.claim(
    "Previous-token heads feed the keys of induction heads: K-composition",
    paper="'Two-layer attention-only transformers': the induction heads' K-composition with a previous-token head "
    "stands out among all pairs",
    control="Q- and V-composition of the same pair, and the model before training",
)
def keys_compose(lab: Lab) -> Verdict:
    """Measure Q-, K- and V-composition between the two layers, over chance."""
    model = small.training(lab).model
    scores = circuits.composition_scores(model, seed=lab.seed)
    fresh = circuits.composition_scores(small.untrained(seed=lab.seed), seed=lab.seed)
    _, previous = small.head_marks(model)
    first, second = divmod(int(scores["K"].argmax()), small.HEADS)
    best = {kind: values[first, second].item() for kind, values in scores.items()}
    _draw_composition(lab, scores, previous[0])
    looks_back = max(range(small.HEADS), key=lambda head: previous[0][head])
    by_head = scores["K"].mean(1).tolist()
    return lab.judge(
        checks={
            "the largest K-composition starts at a previous-token head": previous[0][first] > 0.2,
            "its K exceeds its Q and V by more than 0.05": best["K"] - max(best["Q"], best["V"]) > 0.05,
            "before training no pair is further than 0.05 from chance": max(
                values.abs().max().item() for values in fresh.values()
            )
            < 0.05,
        },
        measured={
            "largest pair": f"0.{first} to 1.{second}",
            "its K": best["K"],
            "attention to the token before, first layer": previous[0],
            "strongest previous-token head": f"0.{looks_back}",
            "mean K over second-layer heads": by_head,
        },
        control={
            "its Q": best["Q"],
            "its V": best["V"],
            "largest before training": max(values.abs().max().item() for values in fresh.values()),
        },
        note="Scores over the mean of Gaussian factors of the same shapes.",
    )


def _draw_composition(lab: Lab, scores: dict[circuits.Kind, Tensor], previous: list[float]) -> None:
    limit = max(values.abs().max().item() for values in scores.values())
    with lab.figure("composition", figsize=(8.8, 3.2)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for place, (kind, values) in zip(axes, scores.items(), strict=True):
            image = place.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            place.set_xticks(range(small.HEADS), [f"1.{head}" for head in range(small.HEADS)])
            place.set_yticks(range(small.HEADS), [f"0.{head} ({share:.0%})" for head, share in enumerate(previous)])
            place.grid(False)
            place.set_title(f"{kind}-composition", loc="center")
        axes[0].set_ylabel("head (looks at the token before)")
        figure.colorbar(image, ax=axes, label="over chance", fraction=0.03)
