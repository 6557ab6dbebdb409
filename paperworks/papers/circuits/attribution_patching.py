"""Attribution patching: every activation patch at once, to first order, for two forward passes and one backward."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.interpret.circuits.attribution_patching import attribute_nodes
from paperworks.interpret.circuits.patching import Patching, Site, logit_difference
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds import induction_model as small
from paperworks.testbeds.capitals import capital_pairs
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


@paper.claim(
    "One gradient ranks heads as a sweep of patches does, and does worse on the whole residual stream",
    paper="Works well for small components such as head outputs, poorly for the residual stream, whose norm and later "
    "layers are far from linear in it",
    control="the same approximation for the residual stream",
)
def ranks_heads(lab: Lab) -> Verdict:
    """Patch SmolLM2's 270 heads one by one on capitals of countries, and attribute them all at once."""
    model = smollm2(lab, smoke_depth=2)
    clean, corrupted, answer, against = capital_pairs(lab, model)
    metric = logit_difference(answer, against)
    depth = len(model.blocks)
    attention: Any = model.blocks[0].mixer
    heads = [f"blocks.{index}.mixer.heads" for index in range(depth)]
    layers = lab.pick(smoke=(0, 1), small=(0, 8, 16, 20, 22, 23, 26))
    stream = [f"blocks.{index}" for index in layers]
    patching = Patching(model, clean, metric, corrupted)
    gap = patching.clean_score - patching.corrupted_score
    with lab.progress("270 heads, one by one", depth * attention.spec.heads) as advance:
        began = time.perf_counter()
        patched = patching.by_head(heads, attention.spec.heads, on_each=lambda: advance(1))
        sweep = time.perf_counter() - began
    began = time.perf_counter()
    found = attribute_nodes(model, clean, corrupted, metric, [*heads, *stream])
    once = time.perf_counter() - began
    attributed = torch.stack([found[path].sum(1).mean(0) for path in heads]) / gap
    with lab.progress("residual stream", len(stream) * clean.shape[1]) as advance:
        stream_patched = patching.by_position(stream, range(clean.shape[1]), on_each=lambda: advance(1))
    stream_attributed = torch.stack([found[path].mean(0) for path in stream]) / gap
    correlation = {
        "heads": _pearson(patched, attributed),
        "stream": _pearson(stream_patched, stream_attributed),
    }
    errors = {
        "heads": _error(patched, attributed),
        "stream": _error(stream_patched, stream_attributed),
    }
    _draw(lab, patched, attributed, stream_patched, stream_attributed)
    best = int(patched.argmax())
    return lab.judge(
        checks={
            "correlation above 0.8 over heads": correlation["heads"] > 0.8,
            "lower by at least 0.05 over the residual stream": correlation["stream"] < correlation["heads"] - 0.05,
            "at least 20 times faster than the sweep": lab.scale == "smoke" or sweep / once > 20,
        },
        measured={
            "correlation over heads": correlation["heads"],
            "relative error over heads": errors["heads"],
            "times faster than the sweep": sweep / once,
            "best head": f"{best // attention.spec.heads}.{best % attention.spec.heads}",
            "its effect, patched and attributed": [patched.flatten()[best], attributed.flatten()[best]],
        },
        control={
            "correlation over the stream": correlation["stream"],
            "relative error over the stream": errors["stream"],
        },
        note=f"{len(clean)} prompts; heads at all positions at once, the stream at each position after "
        f"{len(layers)} of the blocks. Relative error: root of the squared errors over the squared effects. In both "
        "the small effects are met and the large ones underestimated by about half; a correlation that rests on a few "
        "large effects hardly tells the two apart.",
    )


def _pearson(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten().to(one)]))[0, 1].item()


def _error(truth: Tensor, estimate: Tensor) -> float:
    return ((truth - estimate.to(truth)).norm() / truth.norm()).item()


def _draw(lab: Lab, patched: Tensor, attributed: Tensor, stream_patched: Tensor, stream_attributed: Tensor) -> None:
    with lab.figure("scatter", figsize=(8.6, 3.7)) as figure:
        axes = figure.subplots(1, 2)
        for place, one, other, title, color in (
            (axes[0], patched, attributed, "270 heads", COLORS[0]),
            (axes[1], stream_patched, stream_attributed, "Residual stream (control)", CONTROL),
        ):
            low = min(one.min(), other.min()).item() - 0.05
            high = max(one.max(), other.max()).item() + 0.05
            place.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=":")
            place.scatter(one.flatten().tolist(), other.flatten().tolist(), s=14, color=color, rasterized=True)
            place.set_xlabel("share restored by patching")
            place.set_title(title)
        axes[0].set_ylabel("estimated from one gradient")
