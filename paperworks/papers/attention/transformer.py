"""The Transformer: an encoder-decoder of attention alone learns to translate one sequence into another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.generation import beam_search
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, Encoder, PostNorm, Seq2Seq, Seq2SeqModel, count_parameters
from paperworks.models.encoder import segments_of
from paperworks.nn import MLP, Attention, CrossAttention, LayerNorm, Placement, SinusoidalPositions
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
)

PAD, START, END, WORDS = 0, 1, 2, 20
SHORTEST, LONGEST = 3, 10


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


def _trained(lab: Lab, spec: Seq2Seq, steps: int, name: str, *, blank: bool = False) -> Seq2SeqModel:
    torch.manual_seed(lab.seed)
    model = spec.build()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(lab.seed + epoch)
        drawn = (_sentences(64, draws) for _ in range(steps))
        return ((_blank(source) if blank else source, target) for source, target in drawn)

    warmup = min(400, steps)
    settings = train.Settings(
        steps=steps,
        lr=(64 * 400) ** -0.5,
        optimizer=train.AdamW(betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0),
        clip=None,
        schedule=train.InverseSqrt(400),
        warmup=warmup,
        min_lr=0.0,
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(name, steps) as advance:
        train.fit(model, _loss, batches, settings, on_step=lambda _: advance(1))
    return model.eval()


@torch.no_grad()
def _right(model: Seq2SeqModel, count: int, *, blank: bool = False) -> tuple[float, float, float]:
    """Return the share of whole sentences right when written greedily, of words right when told the past, the loss."""
    source, target = _sentences(count, torch.Generator().manual_seed(12_345))
    source = _blank(source) if blank else source
    given = model.conditioned(source, Placement(segments=(source > 0).long()))
    start = torch.full((count, 1), START)
    written = beam_search(given, start, beams=1, max_new_tokens=LONGEST + 2, stop_tokens=[END], pad=PAD)
    wanted = target.masked_fill(target == END, PAD)
    width = max(written.shape[1], wanted.shape[1])
    same = [functional.pad(each, (0, width - each.shape[1])) for each in (written, wanted)]
    exact = float((same[0] == same[1]).all(1).float().mean())
    before = functional.pad(target[:, :-1], (1, 0), value=START)
    logits = model(source, before, source_placement=Placement(segments=(source > 0).long()))
    real = (target > 0) & (target != END)
    told = float((logits.argmax(-1) == target)[real].float().mean())
    loss = float(functional.cross_entropy(logits[real], target[real]))
    return exact, told, loss


@paper.claim(
    "Two layers learn to reverse sentences; positions, cross-attention and the causal mask are each needed",
    paper="Table 2: better translations than recurrent and convolutional models; Table 3 (E): positions",
    control="without positions; without what the encoder read; without the causal mask",
)
def reverses_sentences(lab: Lab) -> Verdict:
    """Sentences of 3 to 10 of 20 words; width 64, 2 + 2 layers, the paper's optimizer, schedule and label smoothing."""
    steps, judged = lab.pick(smoke=(3, 8), small=(1500, 500))
    spec = transformer(64, 2, 4, 256, WORDS + 3)
    encoder, decoder = spec.encoder, spec.decoder
    writing = decoder.blocks[0]
    peeking = replace(writing, mixer=Attention(heads=4, causal=False))
    arms = {
        "Transformer": spec,
        "no positions": replace(spec, encoder=replace(encoder, position=None), decoder=replace(decoder, position=None)),
        "nothing to read": spec,
        "no causal mask": replace(spec, decoder=replace(decoder, block=peeking)),
    }
    found: dict[str, tuple[float, float, float]] = {}
    for name, arm in arms.items():
        length = steps if name == "Transformer" else steps // 2  # the controls are far from it long before
        blank = name == "nothing to read"
        found[name] = _right(_trained(lab, arm, length, name, blank=blank), judged, blank=blank)
    with lab.figure("reversal", figsize=(7.2, 2.6)) as figure:
        axes = figure.subplots()
        for offset, part, label, alpha in ((0.2, 0, "sentences written", 1.0), (-0.2, 1, "words, told the past", 0.45)):
            values = [each[part] for each in found.values()]
            places = [place + offset for place in range(len(found))][::-1]
            colors = [COLORS[0], CONTROL, CONTROL, CONTROL]
            axes.barh(places, values, height=0.36, color=colors, alpha=alpha, label=label)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:.2f} {label}", va="center", fontsize=8)
        axes.set_yticks(range(len(found)), list(found)[::-1])
        axes.set(title="Right on held-out sentences", xlim=(0, 1.4))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    ours = found["Transformer"]
    return lab.judge(
        checks={
            "at least 0.97 of the sentences are written without a mistake": ours[0] >= 0.97,
            "without positions below 0.5": found["no positions"][0] < 0.5,
            "with nothing to read words are guessed: below 0.1": found["nothing to read"][1] < 0.1,
            "without the mask the past says all (loss below 0.6)": found["no causal mask"][2] < 0.6,
            "and nothing can be written": found["no causal mask"][0] < 0.1,
        },
        measured={"sentences right": ours[0], "words right, told the past": ours[1], "steps": steps},
        control={
            "sentences right: no positions, nothing to read, no mask": [found[name][0] for name in list(found)[1:]],
            "words right, told the past": [found[name][1] for name in list(found)[1:]],
            "loss, told the past": [found[name][2] for name in list(found)[1:]],
        },
        note="Controls get half of the steps. Smoothed labels do not ask for a loss of 0: a sure word has about 0.1. "
        "Without content, every word of the source is one and the same, so that its length alone can be read.",
    )
