"""The Transformer: an encoder-decoder of attention alone learns to translate one sequence into another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.generation import beam_search
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import Block, Decoder, Encoder, PostNorm, Seq2Seq, Seq2SeqModel, count_parameters
from paperworks.models.encoder import segments_of
from paperworks.nn import MLP, Attention, CrossAttention, LayerNorm, Placement, SinusoidalPositions
from paperworks.testbeds.training import fit
from paperworks.train.losses import IGNORED

paper = Paper(
    key="transformer",
    title="Attention Is All You Need",
    authors="Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
    year=2017,
    ref="arXiv:1706.03762",
    family="attention",
    summary=(
        "Attention replaces recurrence: an encoder reads the source all at once, a decoder writes the target seeing "
        "its own past and the encoder's output, and sinusoids say where tokens stand."
    ),
    implements=(
        "paperworks.models.seq2seq.Seq2Seq",
        "paperworks.nn.attention.cross.CrossAttention",
        "paperworks.nn.position.absolute.SinusoidalPositions",
        "paperworks.train.losses.smoothed_cross_entropy_sum",
    ),
    equation=r"\operatorname{Attention}(Q, K, V) = \operatorname{softmax}\left(Q K^\top / \sqrt{d_k}\right) V",
    usage="""
import torch
from paperworks.models import count_parameters
from paperworks.papers.attention.transformer import transformer

print("base:", count_parameters(transformer(512, 6, 8, 2048, 37_000)), "parameters")
model = transformer(64, 2, 4, 256, vocab_size=100).build()  # Seq2Seq(encoder=Encoder(...), decoder=Decoder(...))
source, target = torch.randint(1, 100, (2, 9)), torch.randint(1, 100, (2, 7))
print("logits of the target:", tuple(model(source, target).shape))
""",
)

PAD, START, END, WORDS = 0, 1, 2, 20
SHORTEST, LONGEST = 3, 6
WARMUP = 400  # steps


def transformer(dim: int, depth: int, heads: int, hidden: int, vocab_size: int, dropout: float = 0.1) -> Seq2Seq:
    """Return the paper's architecture: post-norm, no biases in attention, one table for all three embeddings."""
    looking = Block(
        norm=LayerNorm(),
        arrangement=PostNorm(),
        mixer=Attention(heads=heads, causal=False),
        feedforward=MLP(hidden=hidden, activation="relu"),
        dropout=dropout,
    )
    writing = replace(looking, mixer=Attention(heads=heads), cross=CrossAttention(heads=heads))
    shared = {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": depth,
        "norm": None,
        "position": SinusoidalPositions(),
        "embedding_scale": dim**0.5,
        "embedding_std": dim**-0.5,
        "dropout": dropout,
    }
    return Seq2Seq(encoder=Encoder(block=looking, **shared), decoder=Decoder(block=writing, tied=True, **shared))


@paper.claim(
    "Both models have the published sizes, and positions turn into each other by a fixed rotation",
    paper="Table 3: 65M and 213M parameters; Section 3.5: PE(pos + k) is a linear function of PE(pos); Section 5.3",
    kind="exact",
    control="positions of random vectors",
)
@torch.no_grad()
def sizes_positions_and_rates(lab: Lab) -> Verdict:
    """Count on the meta device; rotate sinusoids; follow the learning rate; change what must not be seen."""
    base = count_parameters(transformer(512, 6, 8, 2048, 37_000))
    big = count_parameters(transformer(1024, 6, 16, 4096, 37_000))
    sinusoids = SinusoidalPositions()
    table = sinusoids.table(torch.arange(200), 64)
    rates = 10_000 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    moved, k = table[:150].unflatten(-1, (-1, 2)), 37
    sine, cosine = (k * rates).sin(), (k * rates).cos()
    turned = torch.stack(
        (moved[..., 0] * cosine + moved[..., 1] * sine, moved[..., 1] * cosine - moved[..., 0] * sine), -1
    ).flatten(-2)
    rotation = float((turned - table[k : k + 150]).abs().max())
    random = torch.randn(200, 64, generator=torch.Generator().manual_seed(lab.seed), dtype=torch.float64)
    fitted = torch.linalg.lstsq(random[:150], random[k : k + 150]).solution
    unfitted = float((random[:150] @ fitted - random[k : k + 150]).abs().max())
    settings = train.Settings(
        steps=20_000, lr=(512 * 4000) ** -0.5, warmup=4000, schedule=train.InverseSqrt(4000), min_lr=0.0
    )
    paper_rate = [512**-0.5 * min(n**-0.5, n * 4000**-1.5) for n in (1, 2000, 4000, 4001, 20_000)]
    ours = [settings.lr * settings.factor(n - 1) for n in (1, 2000, 4000, 4001, 20_000)]
    torch.manual_seed(lab.seed)
    model = transformer(32, 2, 4, 64, WORDS + 3, dropout=0.0).build().double().eval()
    source, target = torch.randint(3, 23, (2, 9)), torch.randint(3, 23, (2, 7))
    lengths = segments_of(torch.tensor([9, 5]), 9)
    logits = model(source, target, source_placement=Placement(segments=lengths))
    changed = torch.where(lengths > 0, source, (source + 1) % 23)
    later = target.clone()
    later[:, 4] = (later[:, 4] + 1) % 23
    apart = max(abs(one / other - 1) for one, other in zip(ours, paper_rate, strict=True))
    checks = {
        "base and big have 63,045,632 and 214,171,648 parameters": (base, big) == (63_045_632, 214_171_648),
        "PE(pos + k) is a rotation of PE(pos)": rotation < 1e-12,
        "the rate is d^-0.5 min(n^-0.5, n w^-1.5)": apart < 1e-12,
        "the content of padding changes no bit": torch.equal(
            model(changed, target, source_placement=Placement(segments=lengths)), logits
        ),
        "a later token changes nothing before it": torch.equal(
            model(source, later, source_placement=Placement(segments=lengths))[:, :4], logits[:, :4]
        ),
        "no map turns random positions into each other": unfitted > 0.1,
    }
    return lab.judge(
        checks,
        {"parameters": [base, big], "largest error of the rotation": rotation, "peak rate": settings.lr},
        {"random positions, largest error of the best map": unfitted},
        note="37,000 word pieces; the paper prints 65M and 213M.",
    )


def _sentences(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sources and their targets, the source reversed; 0 is padding."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draws)
    words = 3 + torch.randint(WORDS, (count, LONGEST), generator=draws)
    places = torch.arange(LONGEST)
    source = words.masked_fill(places >= lengths[:, None], PAD)
    back = (lengths[:, None] - 1 - places).clamp(min=0)
    target = torch.cat((words.gather(1, back).masked_fill(places >= lengths[:, None], PAD), torch.zeros(count, 1)), 1)
    target = target.long().scatter(1, lengths[:, None], END)
    return source, target


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the smoothed loss of a batch, sum and count of words."""
    source, target = batch
    before = functional.pad(target[:, :-1], (1, 0), value=START)
    logits = model(source, before, source_placement=Placement(segments=(source > 0).long()))
    wanted = target.masked_fill(target == PAD, IGNORED)
    summed = train.smoothed_cross_entropy_sum(logits.flatten(0, 1), wanted.flatten(), 0.1, (PAD, START))
    return summed, (target > 0).sum()


def _blank(source: Tensor) -> Tensor:
    """Return the source without its content: every word the same one."""
    return torch.where(source > 0, 3, PAD)


def _trained(lab: Lab, spec: Seq2Seq, steps: int, seed: int, *, blank: bool) -> Seq2SeqModel:
    model = spec.build()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = lab.generator(1000 * seed + epoch)
        drawn = (_sentences(64, draws) for _ in range(steps))
        return ((_blank(source) if blank else source, target) for source, target in drawn)

    adam = train.AdamW(betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    with lab.threads(1):
        fit(
            model, _loss, batches, steps=steps, lr=(64 * WARMUP) ** -0.5, seed=seed, optimizer=adam, clip=None,
            schedule=train.InverseSqrt(WARMUP), warmup=min(WARMUP, steps), min_lr=0.0,
        )  # fmt: skip
    return model.eval()


@torch.no_grad()
def _right(model: Seq2SeqModel, count: int, draws: torch.Generator, *, blank: bool) -> dict[str, float]:
    """The share of whole sentences right when written greedily, of words right when told the past, and the loss."""
    source, target = _sentences(count, draws)
    source = _blank(source) if blank else source
    given = model.conditioned(source, Placement(segments=(source > 0).long()))
    start = torch.full((count, 1), START)
    written = beam_search(given, start, beams=1, max_new_tokens=LONGEST + 2, stop_tokens=[END], pad=PAD)
    wanted = target.masked_fill(target == END, PAD)
    width = max(written.shape[1], wanted.shape[1])
    same = [functional.pad(each, (0, width - each.shape[1])) for each in (written, wanted)]
    before = functional.pad(target[:, :-1], (1, 0), value=START)
    logits = model(source, before, source_placement=Placement(segments=(source > 0).long()))
    real = (target > 0) & (target != END)
    return {
        "sentences right": float((same[0] == same[1]).all(1).float().mean()),
        "words right, told the past": float((logits.argmax(-1) == target)[real].float().mean()),
        "loss, told the past": float(functional.cross_entropy(logits[real], target[real])),
    }


@paper.claim(
    "Two layers learn to reverse sentences; positions, cross-attention and the causal mask are each needed",
    paper="Table 2: better translations than recurrent and convolutional models; Table 3 (E): positions",
    control="without positions; without what the encoder read; without the causal mask",
)
def reverses_sentences(lab: Lab) -> Verdict:
    """Sentences of 3 to 6 of 20 words; width 64, 2 + 2 layers, the paper's optimizer, schedule and label smoothing."""
    steps, judged = lab.pick(smoke=(3, 8), small=(750, 500))
    spec = transformer(64, 2, 4, 256, WORDS + 3)
    encoder, decoder = spec.encoder, spec.decoder
    placeless = replace(spec, encoder=replace(encoder, position=None), decoder=replace(decoder, position=None))
    peeking = replace(decoder.blocks[0], mixer=Attention(heads=4, causal=False))

    def arm(spec: Seq2Seq, *, blank: bool = False) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = _trained(lab, spec, steps, seed, blank=blank)
            return _right(model, judged, lab.generator(10**6 + seed), blank=blank)

        return measures

    verdict = lab.compare(
        arms={
            "Transformer": arm(spec),
            "no positions": arm(placeless),
            "nothing to read": arm(spec, blank=True),
            "no causal mask": arm(replace(spec, decoder=replace(decoder, block=peeking))),
        },
        main=Beats("Transformer", "no positions", on="sentences right", by=0.5),
        also=[
            AtLeast("Transformer", 0.97, on="sentences right"),
            AtMost("nothing to read", 0.1, on="words right, told the past"),
            AtMost("no causal mask", 0.6, on="loss, told the past"),
            AtMost("no causal mask", 0.1, on="sentences right"),
        ],
        seeds=2,
        note=f"{steps} steps of 64 sentences. Without the mask the past says all, and nothing can be written. Smoothed "
        "labels do not ask for a loss of 0: a sure word has about 0.1. Without content every word of the source is one "
        "and the same, so that its length alone can be read.",
    )
    lab.points("sentences right", name="reversal", title="Held-out sentences written without a mistake")
    return verdict
