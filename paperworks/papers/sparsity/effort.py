"""Effort: choose at run time how many of a product's terms to compute."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from paperworks import compress
from paperworks.compress.pruning.effort import Effort, at_effort
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="effort",
    title="Effort: a possibly new algorithm for LLM inference (bucketMul)",
    authors="Kolinko",
    year=2024,
    ref="kolinko.github.io/effort",
    family="sparsity",
    summary=(
        "Most of the terms v_i W_ij of a matrix-vector product are negligible. Weights sorted by magnitude in small "
        "buckets let whole slices be skipped by one comparison, so the share computed is a knob, turned at run time."
    ),
    implements=("paperworks.compress.pruning.effort.Effort", "paperworks.compress.pruning.effort.at_effort"),
)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean())


@paper.claim(
    "A quarter of the products, chosen for each vector, keeps the direction of the output",
    paper="kolinko.github.io/effort: output cosine usually above 0.98 at 25% to 50% (plots)",
    control="the same share of the weights, chosen once by magnitude whatever the vector",
)
def a_quarter_suffices(lab: Lab) -> Verdict:
    """Multiply heavy-tailed vectors by a normal matrix at several efforts; also by the largest products themselves."""
    size = lab.pick(smoke=64, small=1024)
    draws = torch.Generator().manual_seed(lab.seed)
    weight = torch.randn(size, size, generator=draws)
    chi = torch.randn(3, lab.pick(smoke=4, small=16), size, generator=draws).square().mean(0)
    v = torch.randn(chi.shape, generator=draws) / chi.sqrt()  # Student's t, 3 degrees of freedom
    exact = v @ weight.T
    stored = Effort().encode(weight)
    shares, ours, oracle, static = (0.1, 0.25, 0.5, 0.75), [], [], []
    fractions = []
    for share in shares:
        format = Effort(effort=share)
        fractions.append(float(format.chosen(v, stored).float().mean()))
        ours.append(_cosine(format.multiply(v, stored, (size, size)), exact))
        products = v[:, None] * weight
        bar = products.abs().flatten(1).quantile(1 - share, dim=1) if size <= 512 else _quantile(products, 1 - share)
        oracle.append(_cosine((products * (products.abs() >= bar[:, None, None])).sum(-1), exact))
        kept = weight.abs() >= weight.abs().flatten().kthvalue(int(weight.numel() * (1 - share))).values
        static.append(_cosine(v @ (weight * kept).T, exact))
    with lab.figure("cosine", figsize=(6.0, 3.0)) as figure:
        axes = figure.subplots()
        axes.plot(shares, oracle, color=COLORS[1], label="the largest products themselves")
        axes.plot(fractions, ours, "o-", color=COLORS[0], label="slices of buckets")
        axes.plot(shares, static, color=CONTROL, label="the largest weights")
        axes.set_xlabel("share of the products computed")
        axes.set_title("Cosine of the output with the exact one")
        axes.legend(loc="lower right")
    return lab.judge(
        checks={
            "cosine at least 0.95 at a quarter": ours[1] >= 0.95,
            "above static pruning by 0.02 or more": ours[1] >= static[1] + 0.02,
            "and not above the largest products themselves": all(
                x <= y + 1e-3 for x, y in zip(ours, oracle, strict=True)
            ),
            "the share computed is within 0.05 of the effort": all(
                abs(x - y) <= 0.05 for x, y in zip(fractions, shares, strict=True)
            ),
        },
        measured={"cosine at a quarter": ours[1], "share computed at a quarter": fractions[1], "at a half": ours[2]},
        control={"static pruning": static[1], "the largest products": oracle[1]},
    )


def _quantile(products: Tensor, share: float) -> Tensor:
    """The quantile of each matrix's magnitudes; torch.quantile takes no more than 16 million numbers."""
    return torch.stack([one.abs().flatten().kthvalue(int(share * one.numel())).values for one in products])


@paper.claim(
    "SmolLM2 mostly predicts the same next token at half the effort",
    paper="kolinko.github.io/effort: most of the quality at 25%, the regular speed's worth at 50%",
    control="an eighth of the products",
)
def half_the_effort_agrees(lab: Lab) -> Verdict:
    """Store every linear layer of SmolLM2's blocks as Effort and compare its most likely tokens on a text."""
    known = subject(lab)
    tokens = known.tokens[None, : lab.pick(smoke=8, small=256)]
    with torch.no_grad():
        wanted = known.model(tokens)[0].argmax(-1)
        model = compress.apply(copy.deepcopy(known.model), Effort(), known.targets)
        agreement = {}
        for share in lab.track([1.0, 0.75, 0.5, 0.25, 0.125], "efforts"):
            with at_effort(model, share):
                agreement[share] = float((model(tokens)[0].argmax(-1) == wanted).float().mean())
    lab.table(
        "Tokens whose most likely successor is the dense model's",
        ["effort", "agreement"],
        [[share, f"{value:.1%}"] for share, value in agreement.items()],
    )
    values = list(agreement.values())
    return lab.judge(
        checks={
            "at least 0.85 at effort 0.5": agreement[0.5] >= 0.85,
            "falling with the effort": values == sorted(values, reverse=True),
            "all at effort 1": agreement[1.0] == 1.0,
        },
        measured={f"agreement at {share}": agreement[share] for share in (1.0, 0.5, 0.25)},
        control={"agreement at 0.125": agreement[0.125]},
        note=PROVENANCE + f"{tokens.shape[1]} tokens of Shakespeare.",
    )


@paper.claim(
    "The page's worked examples, and the exact product at effort 1",
    paper="kolinko.github.io/effort: the 3 x 3 example of skipping, the row of 12 in buckets of 4",
    kind="exact",
)
def worked_examples(lab: Lab) -> Verdict:
    """Recompute both examples by hand."""
    v = torch.tensor([1.0, 10.0, 1000.0])
    rows = torch.tensor([[2.0, 8.0, 256.0], [13.0, 1.0, 3.0], [1.0, 0.1, 1.0]])
    products = v[:, None] * rows
    few = (products * (products.abs() >= 100)).sum(0)
    row = torch.tensor([0.46, 0.87, -0.19, 0.27, 0.18, -0.39, -0.29, -0.62, -0.81, -0.34, -0.84, 0.33])
    means = row.view(3, 4).abs().sort(-1, descending=True).values.mean(0)
    published = torch.tensor([0.777, 0.553, 0.300, 0.233])
    draws = torch.Generator().manual_seed(lab.seed)
    weight, x = torch.randn(64, 48, generator=draws), torch.randn(5, 48, generator=draws)
    stored = Effort().encode(weight)
    decoded = Effort().decode(stored, (64, 48))
    found = Effort(effort=1.0).multiply(x, stored, (64, 48))
    one_by_one = torch.stack([Effort(effort=0.3).multiply(row[None], stored, (64, 48))[0] for row in x])
    together = Effort(effort=0.3).multiply(x, stored, (64, 48))
    return lab.judge(
        checks={
            "dense (1132, 118, 1286)": products.sum(0).tolist() == [1132.0, 118.0, 1286.0],
            "the five products above 100 give (1130, 100, 1256)": few.tolist() == [1130.0, 100.0, 1256.0],
            "the slice means of the row": bool(torch.allclose(means, published, atol=6e-4)),
            "decoding gives every weight back": torch.equal(decoded, weight),
            "effort 1 is the product": torch.equal(found, x @ weight.T),
            "one vector at a time or all together": bool(torch.allclose(one_by_one, together, atol=1e-4)),
        },
        measured={"cutoff 100": few.tolist(), "slice means": [round(float(x), 3) for x in means]},
    )
