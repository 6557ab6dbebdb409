"""GPT-3: a model that has seen many tasks learns a new one from the examples before it, with frozen weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.evaluate import score_tokens
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Decoder, DecoderModel, count_parameters, preset
from paperworks.models.presets.gpt import gpt3
from paperworks.nn import Placement
from paperworks.testbeds.recall import IGNORED, RepeatedPairs
from paperworks.testbeds.recall_models import taught

paper = Paper(
    key="gpt3",
    title="Language Models are Few-Shot Learners",
    authors="Brown, Mann, Ryder, Subbiah, Kaplan, and 26 others",
    year=2020,
    ref="arXiv:2005.14165",
    family="pretrained",
    summary=(
        "GPT-2 with every other layer looking back only a band of tokens, up to 175 billion parameters; a task is "
        "described by examples in the context, and no weight changes."
    ),
    implements=(
        "paperworks.models.presets.gpt.gpt3",
        "paperworks.evaluate.score_choices",
        "paperworks.evaluate.few_shot",
        "paperworks.testbeds.recall.RepeatedPairs",
    ),
)

# The table of training compute, in millions of parameters; Table 2.1 gives layers, widths and heads
MILLIONS = {
    "gpt3-small": 125,
    "gpt3-medium": 356,
    "gpt3-large": 760,
    "gpt3-xl": 1_320,
    "gpt3-2.7b": 2_650,
    "gpt3-6.7b": 6_660,
    "gpt3-13b": 12_850,
    "gpt3-175b": 174_600,
}
EXACT = {
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}
SEEN = 4  # times a key was shown before, 0 to this


@paper.claim(
    "Eight sizes have the published parameters; odd layers see a band",
    paper="Table 2.1 and the table of training compute: 125M to 174.6B, 3.14e23 FLOP",
    kind="exact",
    control="XL with 24 heads and 13B with a width of 5140, as Table 2.1 prints them",
)
@torch.no_grad()
def sizes_are_exact(lab: Lab) -> Verdict:
    """Count parameters; compare a banded layer with its mask written out; score a case of unequal lengths."""
    counted = {name: count_parameters(preset(name)) for name in MILLIONS}
    printed = {
        "XL, 24 heads": count_parameters(gpt3(2048, 24, 24, 128)),
        "13B, width 5140": count_parameters(gpt3(5140, 40, 40, 128)),
    }
    torch.manual_seed(lab.seed)
    gap, unbanded = _band(window=5)
    chances = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
    scores = score_tokens(_Table(chances.log()), [0], [[1], [2, 2]])
    compute = 6 * counted["gpt3-175b"] * 300e9
    return lab.judge(
        checks={
            "parameters, as counted in the catalogue": all(counted[name] == EXACT[name] for name in EXACT),
            "parameters, as published, within 0.5%": all(
                abs(counted[name] / 1e6 / millions - 1) < 0.005 for name, millions in MILLIONS.items()
            ),
            "6 N D is 3.14e23 FLOP": abs(compute / 3.14e23 - 1) < 0.005,
            "the band equals its mask": gap < 1e-12,
            "all tokens in view are another function": unbanded > 1e-3,
            "raw and normalized likelihood choose differently": (scores.best("sum"), scores.best("mean")) == (0, 1),
            "Table 2.1's XL and 13B are other sizes": abs(printed["XL, 24 heads"] / 1.32e9 - 1) > 0.1
            and abs(printed["13B, width 5140"] - EXACT["gpt3-13b"]) > 1e6,
        },
        measured={"parameters": list(counted.values()), "FLOP of training, 175B": compute, "largest gap, band": gap},
        control={f"parameters, {name}": value for name, value in printed.items()},
        note="The paper does not print the width of the band; the presets have 256.",
    )


class _Table(nn.Module):
    """p(next | last token) from a table."""

    def __init__(self, logits: Float[Tensor, "last next"]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the logits."""
        return self.logits[tokens]


def _band(window: int) -> tuple[float, float]:
    """Return the largest gap of a banded layer to its equation, and to a layer that sees all."""
    spec = gpt3(32, 2, 4, 8, window=window, vocab_size=9, context=64)
    mixer = spec.blocks[1].mixer.build(32).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    maps: dict[str, nn.Module] = dict(mixer.named_children())
    query, key, value = (maps[name](x).unflatten(-1, (4, 8)).transpose(1, 2) for name in ("query", "key", "value"))
    at = torch.arange(64)
    hidden = (at > at[:, None]) | (at <= at[:, None] - window)
    scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(hidden, -torch.inf)
    expected = maps["output"]((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    full = spec.blocks[0].mixer.build(32).double()
    full.load_state_dict(mixer.state_dict())
    stream = Placement().resolve(2, 64, x.device)
    out = mixer(x, stream)
    return float((out - expected).abs().max()), float((full(x, Placement().resolve(2, 64, x.device)) - out).abs().max())


def _spec(lab: Lab, task: RepeatedPairs) -> Decoder:
    """Four layers of width 64, every other one with a band of 16 tokens."""
    dim, depth = lab.pick(smoke=(16, 1), small=(64, 4), large=(128, 4))
    base = gpt3(dim, depth, 4, dim // 4, window=16, vocab_size=task.vocab_size, context=2 * task.pairs)
    return replace(base, init_std=0.1)


@torch.no_grad()
def _by_shots(model: DecoderModel, rows: int) -> list[float]:
    """Return the accuracy at keys that were shown 0, 1 ... times before, on maps never seen in training."""
    task = RepeatedPairs(pairs=PAIRS)
    batch = task.draw(rows, torch.Generator().manual_seed(991))
    asked = batch["targets"] != IGNORED
    right = (model(batch["tokens"]).argmax(-1) == batch["targets"])[asked].view(rows, -1)
    keys = batch["tokens"][:, ::2]
    before = (keys[:, :, None] == keys[:, None, :]).tril(-1).sum(-1)
    return [float(right[before == shots].float().mean()) for shots in range(SEEN + 1)]


PAIRS = 24


@paper.claim(
    "What a new map says is learned from one example, in the context alone",
    paper="Figure 1.2: accuracy rises with the number of examples in the context, without gradient updates",
    control="the same model trained on documents of one fixed map",
)
def learns_in_context(lab: Lab) -> Verdict:
    """Train on documents that each define a map from 16 keys to 16 values; ask maps that no document had."""
    own, fixed = RepeatedPairs(pairs=PAIRS, fewest=2), RepeatedPairs(pairs=PAIRS, one_map=5)
    steps = lab.pick(smoke=(2, 2), small=(2400, 300), large=(20_000, 2000))
    rising: dict[int, list[float]] = {}

    def look(step: int, model: DecoderModel) -> None:
        rising[step] = _by_shots(model, 100)

    every = max(1, steps[0] // 16)
    many = taught(
        lab, _spec(lab, own), own, steps[0], "a map in each document", rows=64, lr=3e-3, every=every, look=look
    )
    one = taught(lab, _spec(lab, fixed), fixed, steps[1], "one map in all", rows=32, lr=3e-3)
    rows = lab.pick(smoke=100, small=1000)
    with lab.threads(1):
        learned, control = _by_shots(many, rows), _by_shots(one, rows)
        known = fixed.draw(200, torch.Generator().manual_seed(5))
        asked = known["targets"] != IGNORED
        memorized = float((one(known["tokens"]).argmax(-1) == known["targets"])[asked].float().mean())
    with lab.figure("shots", figsize=(7.6, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        shots = range(SEEN + 1)
        left.plot(shots, control, color=CONTROL, marker="o", label="trained on one map")
        left.plot(shots, learned, color=COLORS[0], marker="o", label="a map in each document")
        left.axhline(1 / 16, color="0.3", linewidth=1, linestyle="--")
        left.set_xticks(shots)
        left.set_ylim(0, 1.05)
        left.set_xlabel("times the key was shown before")
        left.set_ylabel("accuracy, new maps")
        left.legend()
        for number, color in zip((0, 1, 3), (CONTROL, COLORS[0], COLORS[2]), strict=True):
            right.plot(list(rising), [found[number] for found in rising.values()], color=color, label=f"shown {number}")
        right.set_ylim(0, 1.05)
        right.set_xlabel("steps of training")
        right.legend()
    return lab.judge(
        checks={
            "with no example at most 0.12 (chance is 0.0625)": learned[0] <= 0.12,
            "with one example at least 0.9": learned[1] >= 0.9,
            "trained on one map: no rise, at most 0.2 with any number": max(control) <= 0.2,
            "that model knows its own map": memorized >= 0.95,
        },
        measured={"accuracy after 0, 1 ... examples": learned},
        control={"accuracy after 0, 1 ... examples": control, "accuracy on its own map": memorized},
        note=f"GPT-3's layers, full and banded in turn, four of width 64; {PAIRS} pairs a document, whose keys are 2 "
        "to 16 in training and 16 when asked. The catalogue's width of 128 had learned nothing after 1,000 steps, all "
        "that five minutes allow; two wide heads in place of four stopped at 0.39, 0.55, 0.64 and 0.78 after 1 to 4 "
        "examples. All keys of a document compete for each look, and the look sharpens slowly.",
    )
