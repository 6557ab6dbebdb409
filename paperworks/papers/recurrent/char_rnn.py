"""Character-level recurrent networks: read a text in order, carry the state, and some cells come to mean something."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks import train
from paperworks.data.text.windows import ordered_windows
from paperworks.generation import Sampling, generate
from paperworks.interpret import record
from paperworks.interpret.probing.separation import auroc
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel, NoResidual, count_parameters
from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.nn import LSTM, Elman, Mixer
from paperworks.nn.identity_norm import NoNorm
from paperworks.testbeds.characters import play
from paperworks.testbeds.training import fit
from paperworks.train.streams import Streams

paper = Paper(
    key="char-rnn",
    title="The Unreasonable Effectiveness of Recurrent Neural Networks",
    authors="Karpathy",
    year=2015,
    ref="karpathy.github.io/2015/05/21/rnn-effectiveness",
    family="recurrent",
    summary=(
        "A stack of LSTM layers that predicts the next character of a text, trained on chunks with the state carried "
        "over, writes text in its style; single cells turn out to track quotes, brackets or the length of a line."
    ),
    implements=(
        "paperworks.nn.recurrent.classic.LSTM",
        "paperworks.train.streams.Streams",
        "paperworks.train.optim.clipping.ClipByValue",
    ),
    equation=(
        r"P(x_{t+1} \mid x_{\le t}) = \operatorname{softmax}(W h_t), \quad h_t = \operatorname{LSTM}(x_t, h_{t-1})"
    ),
    usage="""
import torch
from paperworks import train
from paperworks.nn import LSTM
from paperworks.papers.recurrent.char_rnn import network
from paperworks.train.streams import Streams

text = torch.randint(20, (2000,))  # ids of characters, read in order, the state carried from chunk to chunk
streams = Streams(text, batch=10, length=25)
model = network(LSTM(), vocab_size=20, dim=32).build()
train.fit(model, streams.loss, streams, train.Settings(steps=8, lr=4e-3, save_every=None))
print("nats:", train.evaluate(model, streams.loss, streams)["loss"])
""",
)

HIDDEN, LAYERS = 128, 2  # char-rnn's defaults, as are the next three
STREAMS, CHUNK, CLIP = 50, 50, 5.0
QUOTE, END, LETTERS = 0, 1, 4  # letters are the ids from 2 on
SHORTEST, LONGEST = 20, 30  # characters between two marks
STEPS, LR = 700, 4e-3  # 402 steps an epoch; char-rnn keeps 2e-3 for ten epochs
QUOTE_STEPS, QUOTE_LR = 1000, 5e-3


def network(mixer: Mixer, vocab_size: int, dim: int = HIDDEN, layers: int = LAYERS) -> Decoder:
    """Return layers of one recurrent unit, one on the other, nothing added, nothing normed."""
    block = Block(norm=NoNorm(), arrangement=NoResidual(), mixer=mixer)
    return Decoder(vocab_size=vocab_size, dim=dim, depth=layers, block=block, norm=None, init_std=0.08)


@paper.claim(
    "Gradients by hand are the derivatives, chunks with a carried state one text, cold samples the likeliest ones",
    paper="min-char-rnn (the numerical check), char-rnn's training and sampling",
    kind="exact",
    control="chunks that begin from nothing",
)
def gradients_chunks_and_temperature(lab: Lab) -> Verdict:
    """The backward pass written out by hand against differences and autograd; chunks against one pass; T near 0."""
    torch.manual_seed(lab.seed)
    vocab, width, time = 11, 7, 25
    spec = network(Elman(), vocab, width, layers=1)
    model = spec.build().double()
    tokens = torch.randint(vocab, (time + 1,))
    weights = _by_name(model)
    _, ours = _hand(weights, tokens)
    nats, count = train.next_token_loss(model, {"tokens": tokens[None, :-1], "targets": tokens[None, 1:]})
    named = dict(model.named_parameters())
    automatic = dict(zip(named, torch.autograd.grad(nats, list(named.values())), strict=True))
    autograd = max(float((automatic[name] - ours[name]).abs().max()) for name in named)
    differences = _relative_errors(weights, tokens, ours)
    text = torch.randint(vocab, (201,))
    streams = Streams(text, batch=1, length=20)
    whole = train.evaluate(model, train.next_token_loss, [text[None]])["loss"]
    carried = train.evaluate(model, streams.loss, streams)["loss"]
    fresh = [{"tokens": text[None, at : at + 20], "targets": text[None, at + 1 : at + 21]} for at in range(0, 200, 20)]
    forgetting = train.evaluate(model, train.next_token_loss, fresh)["loss"]
    prompt = text[None, :30]
    cold = generate(model, prompt, max_new_tokens=40, temperature=1e-6, seed=lab.seed)
    likeliest = generate(model, prompt, max_new_tokens=40, temperature=0.0)
    logits = model(prompt)[0, -1].detach()
    kept = Sampling(temperature=0.5)
    draws = lab.generator(lab.seed)
    drawn = kept.choose(logits.expand(lab.pick(smoke=20_000, small=200_000), -1), generator=draws)
    shares = torch.bincount(drawn, minlength=vocab) / len(drawn)
    off = float((shares - torch.softmax(logits / 0.5, -1)).abs().max())
    checks = {
        "numerical check below 1e-6": max(differences) < 1e-6,
        "and equal to autograd": autograd < 1e-10,
        "carried chunks are one long pass": abs(carried - whole) < 1e-12,
        "T = 1e-6 writes what argmax writes": torch.equal(cold, likeliest),
        "T divides logits, not probabilities": off < 0.02,
        "chunks from nothing are another loss": abs(forgetting - whole) > 1e-9,
    }
    measured = {
        "largest relative error of the numerical check": max(differences),
        "largest difference from autograd": autograd,
        "carried and whole differ by": abs(carried - whole),
        "shares drawn at T = 0.5 off by": off,
        "characters": int(count),
    }
    return lab.judge(checks, measured, {"chunks from nothing and whole differ by": abs(forgetting - whole)})


Weights = dict[str, Tensor]


def _by_name(model: DecoderModel) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _hand(weights: Weights, tokens: Tensor) -> tuple[float, Weights]:
    """Return the summed loss of a tanh network and its gradients, both passes written out character by character."""
    table, reading = weights["embedding.weight"], weights["blocks.0.mixer.input.weight"]
    bias, recurrent = weights["blocks.0.mixer.input.bias"], weights["blocks.0.mixer.recurrent.weight"]
    output = weights["unembedding.weight"]
    states, shares, loss = [torch.zeros_like(bias)], [], 0.0
    inputs, targets = tokens[:-1].tolist(), tokens[1:].tolist()
    for token, target in zip(inputs, targets, strict=True):
        states.append(torch.tanh(reading @ table[token] + recurrent @ states[-1] + bias))
        powers = (output @ states[-1]).exp()
        shares.append(powers / powers.sum())
        loss -= float(shares[-1][target].log())
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    later = torch.zeros_like(bias)  # what the steps after this one say of its state
    for step in reversed(range(len(inputs))):
        error = shares[step].clone()
        error[targets[step]] -= 1.0
        found["unembedding.weight"] += torch.outer(error, states[step + 1])
        inside = (output.T @ error + later) * (1 - states[step + 1] ** 2)
        found["blocks.0.mixer.input.bias"] += inside
        found["blocks.0.mixer.input.weight"] += torch.outer(inside, table[inputs[step]])
        found["blocks.0.mixer.recurrent.weight"] += torch.outer(inside, states[step])
        found["embedding.weight"][inputs[step]] += reading.T @ inside
        later = recurrent.T @ inside
    return loss, found


def _relative_errors(weights: Weights, tokens: Tensor, gradients: Weights, step: float = 1e-5) -> list[float]:
    """Return |numerical - analytical| / |sum| of ten numbers of each weight, the largest of its gradients."""
    errors = []
    for name, weight in weights.items():
        for place in gradients[name].abs().flatten().topk(10 if weight.numel() > 10 else 1).indices.tolist():
            losses = []
            for moved in (step, -step):
                changed = {**weights, name: weight.clone()}
                changed[name].view(-1)[place] += moved
                losses.append(_hand(changed, tokens)[0])
            numerical, analytical = (losses[0] - losses[1]) / (2 * step), float(gradients[name].flatten()[place])
            errors.append(abs(numerical - analytical) / abs(numerical + analytical))
    return errors


def _fitted(lab: Lab, spec: Decoder, streams: Streams, steps: int, lr: float, seed: int) -> DecoderModel:
    """Train as char-rnn does: RMSProp with a memory of 0.95, each number of the gradient clipped to +-5."""
    model = spec.build()
    optimizer = train.ClipByValue(optimizer=train.RMSprop(alpha=0.95), limit=CLIP)
    with lab.threads(1):
        fit(model, streams.loss, streams, steps=steps, lr=lr, seed=seed, warmup=0.0, clip=None, optimizer=optimizer)
    return model.eval()


@paper.claim(
    "Two layers of 128 cells learn Shakespeare far below what counts of trigrams know, by the state they carry",
    paper="char-rnn's default sizes on tinyshakespeare; the post's samples of it",
    control="a trigram model of the same text; and the same network with its state put to nothing at every chunk",
    reach="real",
)
def learns_shakespeare(lab: Lab) -> Verdict:
    """Nearly two passes over the text, scored on the tenth held out with the state carried through."""
    steps, judged = lab.pick(smoke=(2, 300), small=(STEPS, 40_000))
    text = play()
    spec = network(LSTM(), text.tokenizer.vocab_size)
    held_out = text.validation[:judged]
    counted = text.training[: lab.pick(smoke=3_000, small=len(text.training))].tolist()

    @cache
    def network_of(seed: int) -> DecoderModel:
        return _fitted(lab, spec, Streams(text.training, batch=STREAMS, length=CHUNK), steps, LR, seed)

    def carried(seed: int) -> dict[str, float]:
        whole = Streams(held_out, batch=1, length=500)
        with lab.threads(1):
            return {"nats a character": train.evaluate(network_of(seed), whole.loss, whole)["loss"]}

    def forgotten(seed: int) -> dict[str, float]:
        windows = ordered_windows(held_out, length=CHUNK)
        with lab.threads(1):
            return {"nats a character": train.evaluate(network_of(seed), train.next_token_loss, windows)["loss"]}

    def counts(order: int) -> Callable[[int], dict[str, float]]:
        model = cache(lambda: KneserNey(counted, text.tokenizer.vocab_size, order))
        return lambda seed: {"nats a character": -float(model().log_probabilities(held_out.tolist()).mean())}

    verdict = lab.compare(
        arms={
            "LSTM": carried,
            "state put to nothing": forgotten,
            "trigrams": counts(3),
            "5-grams": counts(5),
        },
        main=Beats("LSTM", "trigrams", on="nats a character", by=0.15, lower=True),
        also=[Beats("LSTM", "state put to nothing", on="nats a character", by=0.01, lower=True)],
        seeds=2,
        measured={"parameters": count_parameters(spec)},
        note=f"{steps} steps, 1.7 of char-rnn's 50 epochs; the rate falls by a cosine to a tenth. Counts of 5-grams, "
        "smoothed as Kneser and Ney do, still know more than so small a network after so little.",
    )
    if verdict.seeds:
        model = network_of(verdict.seeds[0])
        model.tokenizer = text.tokenizer
        for temperature in (0.5, 1.0):
            written = generate(
                model, "ROMEO:\n", max_new_tokens=lab.pick(smoke=5, small=300), temperature=temperature, seed=0
            )
            lab.text(f"Written at temperature {temperature}", "ROMEO:\n" + written)
    return verdict


@cache
def _quoted(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Write letters with quotes in them; return characters, and which stand inside quotes.

    Between two marks are 20 to 30 letters, alike inside and outside. After the mark that closes a quote comes the end
    of the line, after the one that opens it a letter: so one character in about 50 needs to know where it is.
    """
    draws = torch.Generator().manual_seed(seed)
    marks = length // SHORTEST + 2
    gaps = torch.randint(SHORTEST, LONGEST + 1, (marks,), generator=draws).tolist()
    pieces, inside = list[Tensor](), list[Tensor]()
    for index, gap in enumerate(gaps):
        letters = 2 + torch.randint(LETTERS, (gap,), generator=draws)
        closing = index % 2 == 1
        pieces.append(torch.cat((letters, torch.tensor([QUOTE, END] if closing else [QUOTE]))))
        inside.append(torch.cat((torch.full((gap,), closing), torch.zeros(2 if closing else 1, dtype=torch.bool))))
    return torch.cat(pieces)[:length], torch.cat(inside)[:length]


@torch.no_grad()
def _after_marks(model: DecoderModel, text: Tensor) -> float:
    """Return the loss on the characters that follow a mark: letter or end, what only the memory knows."""
    logits = model(text[None])[0, :-1]
    asked = text[:-1] == QUOTE
    ended = torch.stack((logits[:, END], torch.cat((logits[:, :1], logits[:, 2:]), 1).logsumexp(1)), 1)
    return F.cross_entropy(ended[asked], (text[1:][asked] != END).long()).item()


@torch.no_grad()
def _best_cell(model: DecoderModel, text: Tensor, inside: Tensor, tap: str) -> tuple[int, float, Tensor]:
    """Return the unit that tells inside from outside best, chosen on the first half, judged on letters of the second.

    Its sign is chosen there too; the AUC is that of tanh of the unit.
    """
    with record(model, [tap]) as seen:
        model(text[None])
    cells = torch.tanh(seen[tap][0].double())
    letters = text >= 2
    half = len(text) // 2
    first, second = letters.clone(), letters.clone()
    first[half:], second[:half] = False, False
    scores = [auroc(cells[first, cell], inside[first]) for cell in range(cells.shape[1])]
    best = max(range(len(scores)), key=lambda cell: abs(scores[cell] - 0.5))
    sign = 1.0 if scores[best] > 0.5 else -1.0
    return best, auroc(sign * cells[second, best], inside[second]), sign * cells[:, best]


@paper.claim(
    "One cell of an LSTM comes to say whether it stands inside a quote; no unit of a plain recurrent network does",
    paper="The cells that turn on inside quotes, and the post's remark on why LSTMs are used",
    control="a tanh network of as many units, trained alike",
)
def a_cell_tracks_quotes(lab: Lab) -> Verdict:
    """Random letters with marks 20 to 30 characters apart; 32 units, one layer; every unit is asked by its AUC."""
    steps, judged = lab.pick(smoke=(2, 400), small=(QUOTE_STEPS, 6_000))
    curves: dict[str, Tensor] = {}  # of the last seed

    def arm(name: str, mixer: Mixer, tap: str) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            text, _ = _quoted(lab.pick(smoke=5_000, small=200_000), seed)
            held_out, inside = _quoted(judged, 10**6 + seed)
            spec = network(mixer, LETTERS + 2, dim=32, layers=1)
            model = _fitted(lab, spec, Streams(text, batch=32, length=70), steps, QUOTE_LR, seed)
            with lab.threads(1):
                _, auc, curves[name] = _best_cell(model, held_out, inside, tap)
                return {"AUC of the best unit": auc, "loss after a mark": _after_marks(model, held_out)}

        return measures

    verdict = lab.compare(
        arms={
            "LSTM": arm("LSTM", LSTM(), "blocks.0.mixer.cell"),
            "tanh": arm("tanh", Elman(), "blocks.0.mixer.state"),
        },
        main=Beats("LSTM", "tanh", on="AUC of the best unit", by=0.3),
        also=[
            AtLeast("LSTM", 0.95, on="AUC of the best unit"),
            Beats("LSTM", "tanh", on="loss after a mark", by=0.4, lower=True),
        ],
        seeds=3,
        note="The unit and its sign are chosen on the first half of the held-out text and judged on the other. Letters "
        "are alike inside and outside: only the state can tell. The loss after a mark is 0.69 for a coin.",
    )
    _, inside = _quoted(judged, 10**6 + verdict.seeds[-1])
    shown = slice(judged // 2, judged // 2 + min(250, judged // 2))
    with lab.figure("cells", figsize=(7.2, 3.2)) as figure:
        panels: Any = figure.subplots(2, 1, sharex=True)
        for axes, (name, color) in zip(panels, (("LSTM", COLORS[0]), ("tanh", CONTROL)), strict=True):
            values = curves[name][shown]
            axes.fill_between(range(len(values)), -1, 1, where=inside[shown].numpy(), color=COLORS[4], alpha=0.2, lw=0)
            axes.plot(values, color=color, lw=1.2)
            axes.set(title=f"{name}: the unit that tells most", ylim=(-1.05, 1.05))
        panels[-1].set_xlabel("character (shaded: inside a quote)")
    return verdict
