"""Attribution patching: every activation patch at once, to first order, for two forward passes and one backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.interpret import record
from paperworks.interpret.circuits.attribution_patching import attribute_nodes
from paperworks.interpret.circuits.patching import Patching, Site, aligned, logit_difference
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.testbeds import induction_model as small
from paperworks.testbeds.capitals import CAPITALS
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="attribution-patching",
    title="Attribution Patching: Activation Patching At Industrial Scale",
    authors="Nanda",
    year=2023,
    ref="neelnanda.io/mechanistic-interpretability/attribution-patching; edges: arXiv:2310.10348",
    family="circuits",
    summary=(
        "The effect of patching an activation is, to first order, its change times the gradient of the metric: so all "
        "patches of a model are estimated at once. Close for heads, poor for the whole residual stream."
    ),
    implements=(
        "paperworks.interpret.circuits.attribution_patching.attribute_nodes",
        "paperworks.interpret.circuits.attribution_patching.attribute_edges",
    ),
    equation=r"m(\text{run on corrupted with } a \leftarrow a_{clean}) - m(\text{corrupted}) \approx "
    r"(a_{clean} - a_{corrupted}) \cdot \left. \frac{\partial m}{\partial a} \right|_{corrupted}",
    usage="""
import paperworks as pw
import torch
from paperworks.interpret import record
from paperworks.interpret.circuits.attribution_patching import attribute_nodes
from paperworks.interpret.circuits.patching import logit_difference

model = pw.load("smollm2")
encode = model.tokenizer.encode
clean, corrupted = (torch.tensor([encode(f"The capital of {land} is the city of")]) for land in ("France", "Italy"))
paris, rome = torch.tensor(encode(" Paris")[:1]), torch.tensor(encode(" Rome")[:1])
heads = [f"blocks.{layer}.mixer.heads" for layer in range(30)]
found = attribute_nodes(model, clean, corrupted, logit_difference(paris, rome), heads)
effects = torch.stack([found[path].sum((0, 1)) for path in heads])
print("head with the largest effect:", divmod(int(effects.argmax()), effects.shape[1]))
""",
    notes="The queries' and keys' softmax is not recomputed (AtP*), so saturated attention hides effects.",
)


class _Passes:
    """Counts forward passes of a model and backward passes through its last norm."""

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self.forward = self.backward = 0
        self._hooks = [
            model.register_forward_hook(lambda *given: self._count("forward")),
            part.register_full_backward_hook(lambda *given: self._count("backward")),
        ]

    def _count(self, kind: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


@paper.claim(
    "Exact where the metric is linear, complete when integrated, and as cheap as three passes",
    paper="The approximation is exact for linear functions; two forward passes and one backward whatever the number of "
    "patches; integrated gradients add up to the difference of the metric",
    kind="exact",
)
def exact_where_linear(lab: Lab) -> Verdict:
    """Compare with patching in the last layer of a model without norms, and integrate along the embeddings."""
    model = small.untrained(seed=lab.seed)
    clean, corrupted, answer, against = small.induction_pairs(lab, small.VOCAB)
    metric = logit_difference(answer, against)
    path = "blocks.1.mixer.heads"
    passes = _Passes(model, model.blocks[0])
    found = attribute_nodes(model, clean, corrupted, metric, [path, "embedding"])
    passes.stop()
    patching = Patching(model, clean, metric, corrupted)
    apart = max(
        abs(patching.score([Site(path, -1, head)]) - patching.corrupted_score - found[path][:, -1, head].mean().item())
        for head in range(small.HEADS)
    )
    gap = patching.clean_score - patching.corrupted_score
    complete = {}
    for steps in (1, 50):
        begins = attribute_nodes(model, clean, corrupted, metric, "embedding", steps=steps)["embedding"]
        complete[steps] = begins.sum(1).mean().item()
    return lab.judge(
        checks={
            "last layer's heads: equal to patching, to 1e-5": apart < 1e-5,
            "two forward passes and one backward": (passes.forward, passes.backward) == (2, 1),
            "integrated over 50 points, embeddings add up to the difference within 1%": abs(complete[50] / gap - 1)
            < 0.01,
        },
        measured={
            "largest error": apart,
            "passes": [passes.forward, passes.backward],
            "difference of the metric": gap,
            "integrated attributions": complete[50],
            "attributions at one point": complete[1],
        },
    )


PAIRS = 3  # prompts of a seed


def _capital_pairs(lab: Lab, model: DecoderModel, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts, the same with another country, and both capitals; the seed draws countries and order."""
    tokenizer: Any = model.tokenizer
    every = list(CAPITALS.items())
    order = torch.randperm(len(every), generator=lab.generator(seed))[: lab.pick(smoke=2, small=PAIRS)]
    names = [every[index] for index in order.tolist()]
    prompts = [f"The capital of {country} is the city of" for country, _ in names]
    clean, corrupted = aligned(prompts, prompts[1:] + prompts[:1], tokenizer)
    answer = torch.tensor([tokenizer.encode(f" {city}")[0] for _, city in names], device=model.device)
    return clean.to(model.device), corrupted.to(model.device), answer, answer.roll(-1)


@paper.claim(
    "One gradient ranks heads as a sweep of patches does, and does worse on the whole residual stream",
    paper="Works well for small components such as head outputs, poorly for the residual stream, whose norm and later "
    "layers are far from linear in it",
    control="the size of each head's change, without the gradient",
    reach="real",
)
def ranks_heads(lab: Lab) -> Verdict:
    """Patch heads of SmolLM2 one by one on capitals of countries, and attribute them all at once."""
    model = smollm2(lab, smoke_depth=2)
    attention: Any = model.blocks[0].mixer
    paths = [f"blocks.{index}.mixer.heads" for index in range(1, len(model.blocks), 3)]
    stream = [f"blocks.{index}" for index in lab.pick(smoke=(0, 1), small=(8, 16, 22, 26))]

    @cache
    def swept(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Effects by patching and by attribution, as shares of the gap, and how many times faster the latter is."""
        clean, corrupted, answer, against = _capital_pairs(lab, model, seed)
        metric = logit_difference(answer, against)
        patching = Patching(model, clean, metric, corrupted)
        gap = patching.clean_score - patching.corrupted_score
        began = time.perf_counter()
        by_head = patching.by_head(paths, attention.spec.heads)
        sweep = time.perf_counter() - began
        began = time.perf_counter()
        found = attribute_nodes(model, clean, corrupted, metric, [*paths, *stream])
        once = time.perf_counter() - began
        with torch.no_grad(), record(model, paths) as here:
            model(clean)
        with torch.no_grad(), record(model, paths) as there:
            model(corrupted)
        estimates = {
            "heads": torch.stack([found[path].sum(1).mean(0) for path in paths]) / gap,
            "stream": torch.stack([found[path].mean(0) for path in stream]) / gap,
            "change": torch.stack([(here[path] - there[path]).norm(dim=-1).sum(1).mean(0) for path in paths]),
        }
        patched = {"heads": by_head, "stream": patching.by_position(stream, range(clean.shape[1])), "change": by_head}
        return patched, estimates, sweep / once

    def arm(kind: str) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            patched, estimates, speed = swept(seed)
            truth, estimate = patched[kind].double().flatten(), estimates[kind].double().flatten()
            return {
                "correlation with patching": torch.corrcoef(torch.stack([truth, estimate]))[0, 1].item(),
                "relative error": ((truth - estimate).norm() / truth.norm()).item(),
                "times faster than the sweep": speed,
            }

        return measured

    heads, blind, whole = "heads", "heads, change alone", "residual stream"
    verdict = lab.compare(
        arms={heads: arm("heads"), blind: arm("change"), whole: arm("stream")},
        main=Beats(heads, blind, on="correlation with patching", by=0.2),
        also=[
            AtLeast(heads, 0.8, on="correlation with patching"),
            Beats(heads, whole, on="correlation with patching", by=0.05),
            AtLeast(heads, 20, on="times faster than the sweep"),
        ],
        seeds=3,
        note=f"{PAIRS} prompts a seed; the {len(paths) * attention.spec.heads} heads of every third block, at all "
        f"positions at once; the stream at each position after {len(stream)} of the blocks. Relative error: root of "
        "the squared errors over the squared effects. In heads and stream the small effects are met and the large ones "
        "underestimated; a correlation that rests on a few large effects hardly tells the two apart.",
    )
    lab.points("correlation with patching", name="correlation", title="Correlation with patching one by one")
    return verdict
