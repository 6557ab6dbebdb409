"""Effort: choose at run time how many of a product's terms to compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paperworks.compress import Magnitude
from paperworks.compress.format import WeightFormat
from paperworks.compress.pruning.effort import Effort
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.papers.quantization._rounded_model import bench
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
    equation=r"y_i \approx \sum_{j : |v_j| \, \bar w_{b(i, j)} \ge c} W_{ij} v_j, \quad c \text{ such that a share } e "
    r"\text{ of the slices stays}",
    usage="""
import torch
from paperworks import compress

model = torch.nn.Sequential(torch.nn.Linear(512, 512))
x = torch.distributions.StudentT(3.0).sample((8, 512))
exact = model(x)
compress.apply(model, compress.Effort())
for share in (1.0, 0.5, 0.25):
    with compress.at_effort(model, share):
        print("effort", share, "cosine", float(torch.cosine_similarity(model(x), exact).mean().detach()))
""",
    notes="Which products are left out is what is shown; the speed needs a kernel that skips them, which is not built.",
)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean())


@paper.claim(
    "A quarter of the products, chosen for each vector, keeps the direction of the output",
    paper="kolinko.github.io/effort: output cosine usually above 0.98 at 25% to 50% (plots)",
    control="the same share of the weights, chosen once by magnitude whatever the vector",
)
def a_quarter_suffices(lab: Lab) -> Verdict:
    """Multiply heavy-tailed vectors by a normal matrix with a quarter of the products, chosen in three ways."""
    size, share = lab.pick(smoke=64, small=512), 0.25

    def by_buckets(v: Tensor, weight: Tensor) -> tuple[Tensor, float]:
        stored, format = Effort().encode(weight), Effort(effort=share)
        return format.multiply(v, stored, (size, size)), float(format.chosen(v, stored).float().mean())

    def by_weights(v: Tensor, weight: Tensor) -> tuple[Tensor, float]:
        kept = weight.abs() >= weight.abs().flatten().quantile(1 - share)
        return v @ (weight * kept).T, float(kept.float().mean())

    def by_products(v: Tensor, weight: Tensor) -> tuple[Tensor, float]:
        products = v[:, None] * weight
        kept = products.abs() >= products.abs().flatten(1).quantile(1 - share, dim=1)[:, None, None]
        return (products * kept).sum(-1), float(kept.float().mean())

    def arm(choose: Callable[[Tensor, Tensor], tuple[Tensor, float]]) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            weight = torch.randn(size, size, generator=draws)
            chi = torch.randn(3, 16, size, generator=draws).square().mean(0)
            v = torch.randn(chi.shape, generator=draws) / chi.sqrt()  # Student's t, 3 degrees of freedom
            output, computed = choose(v, weight)
            return {"cosine": _cosine(output, v @ weight.T), "share computed": computed}

        return measured

    ours, plain, best = "slices of buckets", "the largest weights", "the largest products"
    verdict = lab.compare(
        arms={ours: arm(by_buckets), plain: arm(by_weights), best: arm(by_products)},
        main=Beats(ours, plain, on="cosine", by=0.05),
        also=[
            AtLeast(ours, 0.95, on="cosine"),
            Beats(best, ours, on="cosine"),
            AtMost(ours, 0.30, on="share computed"),
        ],
        seeds=5,
    )
    lab.points("cosine", title="Cosine of the output with the exact one, a quarter of the products computed")
    return verdict


@paper.claim(
    "SmolLM2 mostly predicts the same next token at half the effort",
    paper="kolinko.github.io/effort: most of the quality at 25%, the regular speed's worth at 50%",
    control="half of the weights, the largest of each matrix, whatever the vector",
    reach="real",
)
def half_the_effort_agrees(lab: Lab) -> Verdict:
    """Compare the most likely tokens of SmolLM2 with those at half and a quarter of the effort, on text."""
    bed = bench(lab, scored=2, length=32)

    def arm(format: WeightFormat, decoded: bool) -> Callable[[int], dict[str, float]]:
        @torch.no_grad()
        def agreement(seed: int) -> dict[str, float]:
            model, texts = bed.rounded(format, seed, decoded=decoded), bed.texts(seed)
            same = model(texts).argmax(-1) == bed.model(texts).argmax(-1)
            return {"tokens predicted alike": float(same.float().mean())}

        return agreement

    metric, half, quarter, static = "tokens predicted alike", "effort 0.5", "effort 0.25", "half of the weights"
    verdict = lab.compare(
        arms={
            half: arm(Effort(effort=0.5), False),
            quarter: arm(Effort(effort=0.25), False),
            static: arm(Magnitude(sparsity=0.5), True),
        },
        main=Beats(half, static, on=metric, by=0.2),
        also=[Beats(half, quarter, on=metric), AtLeast(half, 0.85, on=metric)],
        seeds=3,
        note=PROVENANCE + bed.words + ". 0.85 is our bar for 'most of the quality'.",
    )
    lab.points(metric, title="Share of tokens whose most likely successor is SmolLM2's own")
    return verdict


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
    draws = lab.generator(lab.seed)
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
