"""BERT: a model that fills gaps reads both sides of them, and knows which sentence follows which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.data.tasks.masking import mask_tokens, sentence_pairs
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.models import Block, Decoder, DecoderModel, Encoder, EncoderModel, PostNorm, count_parameters
from paperworks.models.encoder import MaskedLMHead, segments_of
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, Placement
from paperworks.train.losses import IGNORED

paper = Paper(
    key="bert",
    title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    authors="Devlin, Chang, Lee, Toutanova",
    year=2018,
    ref="arXiv:1810.04805",
    family="pretrained",
    summary=(
        "Pre-training by filling in masked words lets every layer see both sides, which a model that predicts the next "
        "word cannot; a second task tells whether one sentence follows another."
    ),
    implements=(
        "paperworks.models.encoder.Encoder",
        "paperworks.models.encoder.MaskedLMHead",
        "paperworks.models.encoder.Pooler",
        "paperworks.data.tasks.masking.mask_tokens",
        "paperworks.data.tasks.masking.sentence_pairs",
    ),
)

KINDS = 8  # of brackets
OPEN, CLOSE, FILLER, MASK = 4, 4 + KINDS, 4 + 2 * KINDS, 3  # 0 padding, 1 start, 2 separator
WORDS = 16
VOCAB = FILLER + WORDS
GROUPS = 5  # brackets of a row, one after the other
ROW = 5 * GROUPS


def _block(*, causal: bool, dim: int, heads: int, hidden: int, dropout: float) -> Block:
    return Block(
        norm=LayerNorm(eps=1e-12),
        arrangement=PostNorm(),
        mixer=Attention(heads=heads, causal=causal, bias=True, dropout=dropout),
        feedforward=MLP(hidden=hidden),
        dropout=dropout,
    )


def bert(dim: int, depth: int, heads: int, vocab_size: int, length: int, dropout: float = 0.1) -> Encoder:
    """Return the paper's encoder: post-norm, learned positions, two token types, a pooler."""
    return Encoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=length,
        position=LearnedPositions(length=length),
        token_types=2,
        embedding_norm=LayerNorm(eps=1e-12),
        norm=None,
        block=_block(causal=False, dim=dim, heads=heads, hidden=4 * dim, dropout=dropout),
        dropout=dropout,
        pooler=True,
    )


class _Pretraining(nn.Module):
    """An encoder with the heads of its two tasks."""

    def __init__(self, encoder: EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.words = MaskedLMHead(encoder, LayerNorm(eps=1e-12))
        self.follows = nn.Linear(encoder.spec.dim, 2)


@paper.claim(
    "The encoders have the published sizes, and masking hides the published shares",
    paper="Section 3: 110M and 340M parameters; Appendix A.1: of 15% of tokens 80% are masked, 10% random, 10% kept",
    kind="exact",
)
@torch.no_grad()
def sizes_and_shares(lab: Lab) -> Verdict:
    """Count on the meta device; draw a million tokens; change the content of padding."""
    base = count_parameters(bert(768, 12, 12, 30_522, 512))
    large = count_parameters(bert(1024, 24, 16, 30_522, 512))
    with torch.device("meta"):
        heads = count_parameters(_Pretraining(bert(768, 12, 12, 30_522, 512).build()))
    draws = torch.Generator().manual_seed(lab.seed)
    tokens = torch.randint(5, 30_000, (lab.pick(smoke=100, small=1000), 1000), generator=draws)
    hidden, targets = mask_tokens(tokens, mask=4, vocab_size=30_000, generator=draws)
    chosen = targets >= 0
    shares = [
        float(each.double().mean())
        for each in (chosen, hidden == 4, chosen & (hidden != tokens) & (hidden != 4), chosen & (hidden == tokens))
    ]
    torch.manual_seed(lab.seed)
    model = bert(32, 2, 4, VOCAB, ROW).build().double().eval()
    rows, segments = torch.randint(4, VOCAB, (2, ROW), generator=draws), segments_of(torch.tensor([ROW, 9]))
    other = torch.where(segments > 0, rows, (rows + 1) % VOCAB)
    real = segments > 0
    same = torch.equal(
        model(rows, Placement(segments=segments))[real], model(other, Placement(segments=segments))[real]
    )
    off = max(abs(found - wanted) for found, wanted in zip(shares, (0.15, 0.12, 0.015, 0.015), strict=True))
    return lab.judge(
        checks={
            "109,482,240 and 335,141,888 parameters with the pooler": (base, large) == (109_482_240, 335_141_888),
            "110,106,428 with both heads": heads == 110_106_428,
            "12% masked, 1.5% random, 1.5% kept, to 0.2 points": off < 0.002,
            "the content of padding changes no bit": same,
        },
        measured={"parameters": [base, large, heads], "chosen, masked, random, kept": shares},
    )


def _brackets(count: int, draws: torch.Generator) -> Tensor:
    """Draw rows of brackets, each of a random kind around three fillers: an opening one follows from nothing before."""
    kinds = torch.randint(KINDS, (count, GROUPS), generator=draws)
    words = FILLER + torch.randint(WORDS, (count, GROUPS, 3), generator=draws)
    groups = torch.cat((OPEN + kinds[..., None], words, CLOSE + kinds[..., None]), 2)
    return groups.flatten(1)


def _settings(lab: Lab, steps: int) -> train.Settings:
    return train.Settings(
        steps=steps, lr=1e-3, warmup=0.1, schedule="linear", min_lr=0.0, optimizer=train.AdamW(weight_decay=0.01),
        seed=lab.seed, save_every=None, log_every=steps, progress=False,
    )  # fmt: skip


@paper.claim(
    "A masked word is recovered from what follows it, which a model of the next word cannot do",
    paper="Section 3.1, Task 1, and Table 5: a left-to-right model is worse on all tasks",
    control="a causal model of equal size trained to predict the next word of the same text",
)
def reads_both_sides(lab: Lab) -> Verdict:
    """Opening brackets are random and known only by the one that closes them; two layers of width 64."""
    steps, judged = lab.pick(smoke=(3, 16), small=(900, 2000))
    torch.manual_seed(lab.seed)
    model = _Pretraining(bert(64, 2, 4, VOCAB, ROW, dropout=0.0).build())

    def filling(epoch: int) -> Iterator[Any]:
        draws = torch.Generator().manual_seed(lab.seed + 1)
        return (mask_tokens(_brackets(64, draws), mask=MASK, vocab_size=VOCAB, generator=draws) for _ in range(steps))

    def fill_loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        tokens, targets = batch
        chosen = targets >= 0
        logits = model.words(model.encoder(tokens)[chosen])
        return functional.cross_entropy(logits, targets[chosen], reduction="sum"), chosen.sum()

    torch.manual_seed(lab.seed)
    causal = Decoder(
        vocab_size=VOCAB,
        dim=64,
        depth=2,
        context=ROW,
        position=LearnedPositions(length=ROW),
        embedding_norm=LayerNorm(eps=1e-12),
        norm=None,
        tied=True,
        block=_block(causal=True, dim=64, heads=4, hidden=256, dropout=0.0),
    ).build()

    def reading(epoch: int) -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(lab.seed + 1)
        return (_brackets(64, draws) for _ in range(steps))

    with lab.threads(1), lab.progress("both models", 2 * steps) as advance:
        train.fit(model, fill_loss, filling, _settings(lab, steps), on_step=lambda _: advance(1))
        train.fit(causal, train.next_token_loss, reading, _settings(lab, steps), on_step=lambda _: advance(1))
    rows = _brackets(judged, torch.Generator().manual_seed(99))
    ours, theirs = _filled(model.eval(), rows), _foreseen(causal.eval(), rows)
    with lab.figure("brackets", figsize=(6.4, 2.4)) as figure:
        axes = figure.subplots()
        names = ["opening, BERT", "opening, next word", "closing, BERT", "closing, next word"]
        values = [ours[0], theirs[0], ours[1], theirs[1]]
        axes.barh(names[::-1], values[::-1], color=[CONTROL, COLORS[0]] * 2)
        axes.axvline(1 / KINDS, color=FAINT, linestyle=":")
        for place, value in enumerate(values[::-1]):
            axes.text(value, place, f" {value:.2f}", va="center")
        axes.set(title="Brackets named right", xlim=(0, 1.12))
    return lab.judge(
        checks={
            "at least 0.9 of the opening brackets are recovered": ours[0] >= 0.9,
            "the next-word model stays near 1 in 8": theirs[0] < 0.2,
            "closing brackets it knows as well": theirs[1] >= 0.9,
        },
        measured={"opening brackets right": ours[0], "closing brackets right": ours[1], "steps": steps},
        control={"opening brackets right": theirs[0], "closing brackets right": theirs[1]},
        note="A bracket is judged among the kinds of its side. One is masked at a time.",
    )


@torch.no_grad()
def _filled(model: Any, rows: Tensor) -> tuple[float, float]:
    found = []
    for place, first in ((5 * (GROUPS // 2), OPEN), (5 * (GROUPS // 2) + 4, CLOSE)):
        hidden = rows.clone()
        hidden[:, place] = MASK
        logits = model.words(model.encoder(hidden)[:, place])[:, first : first + KINDS]
        found.append(float((logits.argmax(-1) + first == rows[:, place]).float().mean()))
    return found[0], found[1]


@torch.no_grad()
def _foreseen(model: DecoderModel, rows: Tensor) -> tuple[float, float]:
    logits, found = model(rows), []
    for place, first in ((5 * (GROUPS // 2), OPEN), (5 * (GROUPS // 2) + 4, CLOSE)):
        said = logits[:, place - 1, first : first + KINDS].argmax(-1) + first
        found.append(float((said == rows[:, place]).float().mean()))
    return found[0], found[1]


def _documents(topics: int, draws: torch.Generator, *, coherent: bool) -> list[list[list[int]]]:
    """Draw documents of six sentences of five words; the words are those of its topic, or any."""
    found = []
    for index in range(40 * topics):
        words = torch.randint(12, (6, 5), generator=draws)
        of_topic = torch.full((6, 1), index % topics) if coherent else torch.randint(topics, (6, 5), generator=draws)
        found.append((4 + 12 * of_topic + words).tolist())
    return found


@paper.claim(
    "The pooled first token tells whether the second sentence follows the first",
    paper="Section 3.1, Task 2: 97% to 98% accuracy of next-sentence prediction",
    control="documents whose words are drawn from all topics, so that nothing tells",
)
def next_sentence_is_learned(lab: Lab) -> Verdict:
    """Eight topics of twelve words; both losses together, as in the paper; judged on documents not trained on."""
    topics = 8
    vocab = 4 + 12 * topics
    steps, judged = lab.pick(smoke=(3, 16), small=(500, 1000))
    accuracy, ceiling = {}, 0.5 + 0.5 * (topics - 1) / topics
    for name, coherent in (("topics", True), ("no topics", False)):
        draws = torch.Generator().manual_seed(lab.seed + 5)
        training, held_out = (_documents(topics, draws, coherent=coherent) for _ in range(2))
        torch.manual_seed(lab.seed)
        model = _Pretraining(bert(64, 2, 4, vocab, 14, dropout=0.0).build())

        def batches(epoch: int, documents: Any = training) -> Iterator[Any]:
            chosen = torch.Generator().manual_seed(lab.seed + 6)
            for _ in range(steps):
                pairs = sentence_pairs(documents, 64, start=1, separator=2, generator=chosen)
                never = (pairs.tokens < 4) | (pairs.segments == 0)
                yield pairs, mask_tokens(pairs.tokens, mask=MASK, vocab_size=vocab, never=never, generator=chosen)

        with lab.threads(1), lab.progress(name, steps) as advance:
            train.fit(model, _both_losses, batches, _settings(lab, steps), on_step=lambda _: advance(1))
        pairs = sentence_pairs(held_out, judged, start=1, separator=2, generator=torch.Generator().manual_seed(98))
        with torch.no_grad():
            hidden = model.eval().encoder(
                pairs.tokens, Placement(segments=pairs.segments), token_types=pairs.token_types
            )
            said = model.follows(model.encoder.pooler(hidden)).argmax(-1)  # type: ignore[misc]
        accuracy[name] = float((said == pairs.is_random).float().mean())
    return lab.judge(
        checks={
            "at least 0.85 are right": accuracy["topics"] >= 0.85,
            "without topics near 0.5": abs(accuracy["no topics"] - 0.5) < 0.06,
        },
        measured={"right": accuracy["topics"], "the most that can be": ceiling, "steps": steps},
        control={"right without topics": accuracy["no topics"]},
        note="One random pair in eight has the topic of the first sentence: no model can tell it.",
    )


def _both_losses(model: Any, batch: Any) -> Tensor:
    """Return the paper's loss: the mean over masked words plus the mean over pairs."""
    pairs, (tokens, targets) = batch
    hidden = model.encoder(tokens, Placement(segments=pairs.segments), token_types=pairs.token_types)
    words = functional.cross_entropy(model.words(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return words + functional.cross_entropy(model.follows(model.encoder.pooler(hidden)), pairs.is_random)
