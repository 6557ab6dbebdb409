"""A mathematical framework for transformer circuits: attention read as two small matrices a head."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from paperworks.interpret.circuits import circuits
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
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
    equation=r"\text{logits} = x W_E W_U + \sum_h A^h x W_E W_{OV}^h W_U + "
    r"\sum_{h_1, h_2} A^{h_2} A^{h_1} x W_E W_{OV}^{h_1} W_{OV}^{h_2} W_U",
    usage="""
from paperworks.interpret.circuits import circuits
from paperworks.testbeds import induction_model

model = induction_model.hand_set()                       # an induction circuit written into the weights
tokens = induction_model.hand_sequences(4)
paths = circuits.path_expansion(model, tokens)
print(len(paths), "paths; they add up:", bool((sum(paths.values()) - model(tokens)).abs().max() < 1e-4))
print("copying score of head 1.0:", circuits.copying_score(circuits.full_ov(model, 1, 0)))
print("K-composition of 0.0 with 1.0:", float(circuits.composition_scores(model)["K"][0, 0]))
""",
    notes="The heads are those of a small model trained on repeated random tokens, not of the paper's models of text.",
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


@cache
def _trained(lab: Lab, seed: int) -> DecoderModel:
    return small.induction_model(Lab(lab.scale, seed))


def _induction_heads(model: DecoderModel) -> list[int]:
    """Heads of the second layer with prefix matching above 0.3, or the strongest where there is none."""
    prefix = small.head_marks(model)[0][1]
    found = [head for head in range(small.HEADS) if prefix[head] > 0.3]
    return found or [prefix.index(max(prefix))]


@paper.claim(
    "Induction heads copy: all eigenvalues of their OV circuit are positive",
    paper="'Summarizing OV/QK matrices': copying heads have positive eigenvalues; 10 of 12 heads of a one-layer model",
    control="the same heads before training",
)
def induction_heads_copy(lab: Lab) -> Verdict:
    """Compare the copying scores of all heads before and after training on repeated tokens."""

    def arm(trained: bool) -> Callable[[int], dict[str, float]]:
        def scores(seed: int) -> dict[str, float]:
            model = _trained(lab, seed) if trained else small.untrained(seed=seed)
            first, second = (
                [circuits.copying_score(circuits.full_ov(model, layer, head)) for head in range(small.HEADS)]
                for layer in (0, 1)
            )
            return {
                "least copying score of the induction heads": min(
                    second[head] for head in _induction_heads(_trained(lab, seed))
                ),
                "largest copying score, first layer": max(first),
                "largest of all, absolute": max(abs(score) for score in first + second),
            }

        return scores

    after, before = "trained", "before training"
    verdict = lab.compare(
        arms={after: arm(True), before: arm(False)},
        main=Beats(after, before, on="least copying score of the induction heads", by=0.4),
        also=[
            AtLeast(after, 0.5, on="least copying score of the induction heads"),
            AtMost(before, 0.3, on="largest of all, absolute"),
            AtMost(after, 0.3, on="largest copying score, first layer"),
        ],
        seeds=3,
        note="Two layers of four heads. The score is the sum of the eigenvalues' real parts over that of their sizes.",
    )
    _draw_eigenvalues(lab, _trained(lab, lab.seed), small.untrained(seed=lab.seed))
    return verdict


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
    control="Q- and V-composition of the same heads, and the model before training",
)
def keys_compose(lab: Lab) -> Verdict:
    """Measure Q-, K- and V-composition of the strongest previous-token head with the induction heads, over chance."""

    def arm(kind: circuits.Kind, *, trained: bool = True) -> Callable[[int], dict[str, float]]:
        def composed(seed: int) -> dict[str, float]:
            model = _trained(lab, seed)
            previous = small.head_marks(model)[1][0]
            first = previous.index(max(previous))
            scores = circuits.composition_scores(model if trained else small.untrained(seed=seed), seed=seed)
            return {
                "composition over chance": scores[kind][first, _induction_heads(model)].mean().item(),
                "attention of the first head to the token before": previous[first],
            }

        return composed

    keys, queries, values, before = "keys", "queries", "values", "keys, before training"
    on = "composition over chance"
    verdict = lab.compare(
        arms={keys: arm("K"), queries: arm("Q"), values: arm("V"), before: arm("K", trained=False)},
        main=Beats(keys, queries, on=on, by=0.05),
        also=[Beats(keys, values, on=on, by=0.05), Beats(keys, before, on=on, by=0.02)],
        seeds=3,
        note="Mean over the induction heads (prefix matching above 0.3); scores over the mean of Gaussian factors of "
        "the same shapes.",
    )
    lab.points(on, name="composition", title="Composition of the previous-token head with the induction heads")
    return verdict
