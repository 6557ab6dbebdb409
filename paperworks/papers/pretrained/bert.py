"""BERT: a model that fills gaps reads both sides of them, and knows which sentence follows which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.data.tasks.masking import mask_tokens, sentence_pairs
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import Block, Decoder, DecoderModel, Encoder, EncoderModel, PostNorm, count_parameters
from paperworks.models.encoder import MaskedLMHead, segments_of
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, Placement
from paperworks.testbeds.training import fit
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
    equation=(
        r"\mathcal L = -\frac{1}{|M|} \sum_{i \in M} \log p(x_i \mid \tilde x) - \log p(\text{is next} \mid "
        r"h_{[\text{CLS}]})"
    ),
    usage="""
import torch
from paperworks.data.tasks.masking import mask_tokens
from paperworks.models import count_parameters
from paperworks.models.encoder import MaskedLMHead
from paperworks.nn import LayerNorm
from paperworks.papers.pretrained.bert import bert

print("BERT base:", count_parameters(bert(768, 12, 12, 30_522, 512)), "parameters")
encoder = bert(64, 2, 4, 100, 32).build()
hidden, targets = mask_tokens(torch.randint(5, 100, (2, 32)), mask=4, vocab_size=100)
print(tuple(MaskedLMHead(encoder, LayerNorm())(encoder(hidden)).shape), int((targets >= 0).sum()), "to recover")
""",
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
    draws = lab.generator(lab.seed)
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


def _fit(lab: Lab, model: nn.Module, loss: Any, batches: Any, steps: int, seed: int) -> None:
    with lab.threads(1):
        fit(
            model, loss, batches, steps=steps, lr=1e-3, seed=seed,
            warmup=0.1, schedule="linear", min_lr=0.0, optimizer=train.AdamW(weight_decay=0.01),
        )  # fmt: skip


@paper.claim(
    "Both sides of a word are read, where a model of the next word, or of the one before, knows one",
    paper="Section 3.1, Task 1, and Table 5: a left-to-right model is worse on all tasks",
    control="causal models of equal size of the same text: one of the next word, one of the word before",
)
def reads_both_sides(lab: Lab) -> Verdict:
    """Brackets of eight kinds around fillers: an opening one is known by its closing one only, and the other way."""
    steps, judged = lab.pick(smoke=(3, 16), small=(550, 2000))

    def masked(seed: int) -> dict[str, float]:
        model = _Pretraining(bert(64, 2, 4, VOCAB, ROW, dropout=0.0).build())

        def filling(epoch: int) -> Iterator[Any]:
            draws = lab.generator(1000 * seed + epoch)
            rows = (_brackets(64, draws) for _ in range(steps))
            return (mask_tokens(each, mask=MASK, vocab_size=VOCAB, generator=draws) for each in rows)

        def loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
            tokens, targets = batch
            chosen = targets >= 0
            logits = model.words(model.encoder(tokens)[chosen])
            return functional.cross_entropy(logits, targets[chosen], reduction="sum"), chosen.sum()

        _fit(lab, model, loss, filling, steps, seed)
        return _both(_filled(model.eval(), _brackets(judged, lab.generator(10**6 + seed))))

    def causal(backwards: bool) -> Callable[[int], dict[str, float]]:
        def right(seed: int) -> dict[str, float]:
            spec = Decoder(
                vocab_size=VOCAB,
                dim=64,
                depth=2,
                context=ROW,
                position=LearnedPositions(length=ROW),
                embedding_norm=LayerNorm(eps=1e-12),
                norm=None,
                tied=True,
                block=_block(causal=True, dim=64, heads=4, hidden=256, dropout=0.0),
            )
            model = spec.build()

            def reading(epoch: int) -> Iterator[Tensor]:
                draws = lab.generator(1000 * seed + epoch)
                rows = (_brackets(64, draws) for _ in range(steps))
                return (each.flip(1) if backwards else each for each in rows)

            _fit(lab, model, train.next_token_loss, reading, steps, seed)
            return _both(_foreseen(model.eval(), _brackets(judged, lab.generator(10**6 + seed)), backwards))

        return right

    verdict = lab.compare(
        arms={"BERT": masked, "next word": causal(False), "word before": causal(True)},
        main=Beats("BERT", "next word", on="right, the lower of both sides", by=0.5),
        also=[
            Beats("BERT", "word before", on="right, the lower of both sides", by=0.5),
            AtLeast("BERT", 0.9, on="right, the lower of both sides"),
            AtLeast("next word", 0.9, on="closing brackets right"),
            AtLeast("word before", 0.9, on="opening brackets right"),
        ],
        seeds=2,
        note=f"{steps} steps of 64 rows, two layers of width 64. A bracket is judged among the kinds of its side, one "
        "masked at a time; chance is 1 in 8.",
    )
    lab.points("right, the lower of both sides", name="brackets", title="Brackets named right, the worse of both sides")
    return verdict


def _both(found: tuple[float, float]) -> dict[str, float]:
    return {
        "opening brackets right": found[0],
        "closing brackets right": found[1],
        "right, the lower of both sides": min(found),
    }


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
def _foreseen(model: DecoderModel, rows: Tensor, backwards: bool) -> tuple[float, float]:
    logits, found = model(rows.flip(1) if backwards else rows), []
    for place, first in ((5 * (GROUPS // 2), OPEN), (5 * (GROUPS // 2) + 4, CLOSE)):
        before = rows.shape[1] - 2 - place if backwards else place - 1
        said = logits[:, before, first : first + KINDS].argmax(-1) + first
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
    steps, judged = lab.pick(smoke=(3, 16), small=(350, 1000))

    def arm(coherent: bool) -> Callable[[int], dict[str, float]]:
        def accuracy(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            training, held_out = (_documents(topics, draws, coherent=coherent) for _ in range(2))
            model = _Pretraining(bert(64, 2, 4, vocab, 14, dropout=0.0).build())

            def batches(epoch: int) -> Iterator[Any]:
                for _ in range(steps):
                    pairs = sentence_pairs(training, 64, start=1, separator=2, generator=draws)
                    never = (pairs.tokens < 4) | (pairs.segments == 0)
                    yield pairs, mask_tokens(pairs.tokens, mask=MASK, vocab_size=vocab, never=never, generator=draws)

            _fit(lab, model, _both_losses, batches, steps, seed)
            pairs = sentence_pairs(held_out, judged, start=1, separator=2, generator=draws)
            with torch.no_grad():
                placement = Placement(segments=pairs.segments)
                hidden = model.eval().encoder(pairs.tokens, placement, token_types=pairs.token_types)
                said = model.follows(model.encoder.pooler(hidden)).argmax(-1)  # type: ignore[misc]
            return {"accuracy": float((said == pairs.is_random).float().mean())}

        return accuracy

    return lab.compare(
        arms={"topics": arm(True), "no topics": arm(False)},
        main=Beats("topics", "no topics", on="accuracy", by=0.3),
        also=[AtLeast("topics", 0.85, on="accuracy"), AtMost("no topics", 0.56, on="accuracy")],
        seeds=2,
        note=f"{steps} steps of 64 pairs. A random pair may have the topic of the first sentence, which no model can "
        "tell.",
    )


def _both_losses(model: Any, batch: Any) -> Tensor:
    """Return the paper's loss: the mean over masked words plus the mean over pairs."""
    pairs, (tokens, targets) = batch
    hidden = model.encoder(tokens, Placement(segments=pairs.segments), token_types=pairs.token_types)
    words = functional.cross_entropy(model.words(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return words + functional.cross_entropy(model.follows(model.encoder.pooler(hidden)), pairs.is_random)
