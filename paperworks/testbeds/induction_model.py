"""The small attention-only models of these papers: trained on repeated random tokens, and one set by hand.

Both have no norms and no biases, so their weights can be read as the framework of transformer circuits reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.core.selection import replace_module
from paperworks.interpret import edit, record
from paperworks.interpret.circuits import head_scores
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, LearnedPositions
from paperworks.nn.identity_norm import NoNorm

VOCAB, DIM, HEADS, LONGEST = 64, 64, 4, 80
STEPS = 1500
BLOCK = 25  # tokens in the repeated block of the test sequences, as in the paper


class PositionedLinear(nn.Linear):
    """y = W (x + position): positions that queries and keys read, and the residual stream does not carry."""

    def __init__(self, in_features: int, out_features: int, positions: nn.Parameter) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.positions = positions

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time out"]:
        """Apply the layer to tokens that stand at 0, 1, 2, ... (no cache)."""
        return functional.linear(x + self.positions[: x.shape[1]], self.weight)


def untrained(depth: int = 2, seed: int = 0) -> DecoderModel:
    """The model before training; embeddings and positions N(0, 1), projections uniform on +-1/8."""
    torch.manual_seed(seed)
    block = Block(norm=NoNorm(), mixer=Attention(heads=HEADS))
    model = Decoder(vocab_size=VOCAB, dim=DIM, depth=depth, block=block, norm=None, context=LONGEST).build()
    positions = nn.Parameter(torch.randn(LONGEST, DIM))
    nn.init.normal_(model.embedding.weight)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if path.endswith((".query", ".key")):
                replace_module(model, path, PositionedLinear(DIM, DIM, positions))
            else:
                module.reset_parameters()
    return model


def repeated(count: int, length: int, repeats: int, generator: torch.Generator) -> Int[Tensor, "count time"]:
    """Draw rows of `length` random tokens, each row repeated; nothing but the repetition can be predicted."""
    return torch.randint(VOCAB, (count, length), generator=generator).repeat(1, repeats)


class RepeatedBlocks:
    """Batches of 32 rows whose block length (13 to 36) and number of repeats change from batch to batch.

    With a fixed length one layer can look a fixed distance back, and nothing has to be matched.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            length = int(torch.randint(13, 37, (), generator=draws))
            yield repeated(32, length, min(4, 72 // length), draws)


def second_copy_loss(model: nn.Module, count: int = 64, seed: int = 12345) -> float:
    """The loss in nats a token on the second copy of blocks of 25 (log 64 = 4.16 for a blind guess)."""
    tokens = repeated(count, BLOCK, 2, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(tokens)[:, BLOCK - 1 : -1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, BLOCK:].flatten()).item()


def smearing(model: DecoderModel) -> AbstractContextManager[Any]:
    """Blend each key with the key before it: k_t <- s k_t + (1 - s) k_{t-1}, s = sigmoid(alpha), alpha a head.

    The paper's "smeared keys" (argument 3), as an edit of the keys; the alphas are parameters of the model.
    """
    if not hasattr(model, "smear"):
        model.smear = nn.Parameter(torch.zeros(len(model.blocks), HEADS))

    def smear(layer: int) -> Callable[[Tensor], Tensor]:
        def blend(keys: Tensor) -> Tensor:
            alphas: Any = model.smear
            share = torch.sigmoid(alphas[layer]).repeat_interleave(DIM // HEADS)
            before = functional.pad(keys[:, :-1], (0, 0, 1, 0))
            return share * keys + (1 - share) * before

        return blend

    return edit(model, {f"blocks.{layer}.mixer.key": smear(layer) for layer in range(len(model.blocks))})


@dataclass
class Training:
    """A trained model, and what its heads did along the way."""

    model: DecoderModel
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # on the second copy
    prefix: list[list[float]] = field(default_factory=list)  # prefix matching of the last layer's heads
    previous: list[list[float]] = field(default_factory=list)  # attention to the token before, of the first layer's

    def look(self, step: int) -> None:
        """Measure the model as it is."""
        self.steps.append(step)
        self.losses.append(second_copy_loss(self.model))
        prefix, previous = head_marks(self.model)
        self.prefix.append(prefix[-1])
        self.previous.append(previous[0])


@torch.no_grad()
def head_marks(model: nn.Module, count: int = 16) -> tuple[list[list[float]], list[list[float]]]:
    """Prefix matching and attention to the token before, by layer and head, on blocks of 25 tokens twice."""
    with record(model, "*.pattern") as seen:
        model(repeated(count, BLOCK, 2, torch.Generator().manual_seed(777)))
    return (
        [head_scores.prefix_matching(pattern, BLOCK).tolist() for pattern in seen.values()],
        [head_scores.previous_token(pattern).tolist() for pattern in seen.values()],
    )


_TRAINED: dict[tuple[str, int, int, bool], Training] = {}


def training(lab: Lab, depth: int = 2, *, smeared: bool = False) -> Training:
    """Train on repeated blocks, once however many claims ask for it: AdamW at 2e-3, 1,500 batches of 32."""
    key = (lab.scale, lab.seed, depth, smeared)
    if key not in _TRAINED:
        _TRAINED[key] = _train(lab, depth, smeared)
    return _TRAINED[key]


def _train(lab: Lab, depth: int, smeared: bool) -> Training:
    run = Training(untrained(depth, lab.seed))
    steps, every = lab.pick(smoke=(4, 2), small=(STEPS, 50))
    settings = train.Settings(
        steps=steps,
        lr=2e-3,
        schedule="constant",
        warmup=0,
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    name = f"{depth} layer{'s' if depth > 1 else ''}{', smeared keys' if smeared else ''}"
    with lab.threads(1), smearing(run.model) if smeared else nullcontext(), lab.progress(name, steps) as advance:
        run.look(0)

        def step(number: int) -> None:
            advance(1)
            if number % every == 0:
                run.look(number)

        train.fit(run.model, train.next_token_loss, RepeatedBlocks(steps, lab.seed), settings, on_step=step)
    run.model.eval()
    return run


def induction_model(lab: Lab) -> DecoderModel:
    """The two-layer model of this seed."""
    return training(lab).model


HAND_VOCAB, HAND_TIME = 16, 24
BEGINNING = 0  # the token before every hand-set sequence: its place alone has no place before it
SHARPNESS = 8.0  # score of a match in the hand-set heads; one match among 23 then gets more than 99% of the attention
CONFIDENCE = 10.0  # logit of a token that gets all the attention


@torch.no_grad()
def hand_set(noise: float = 0.0, seed: int = 0, sharpness: float = SHARPNESS) -> DecoderModel:
    """A two-layer model of two heads a layer whose induction circuit is written into its weights.

    The stream has a place each for the token (16), the position (24), the token before (16) and the answer (16).
    Head 0.0 looks one position back and writes which token stood there. Head 1.0 looks for the place whose token
    before is the present token, and copies the token that stands there to the answer. Heads 0.1 and 1.1 have random
    weights of rank 2 and size `noise`. `sharpness` is the score of a match.
    """
    token, position, before, answer = (
        slice(start, start + size) for start, size in ((0, 16), (16, HAND_TIME), (16 + HAND_TIME, 16), (56, 16))
    )
    dim, head_dim = 72, HAND_TIME
    block = Block(norm=NoNorm(), mixer=Attention(heads=2, head_dim=head_dim))
    model = Decoder(
        vocab_size=HAND_VOCAB,
        dim=dim,
        depth=2,
        block=block,
        norm=None,
        context=HAND_TIME,
        position=LearnedPositions(length=HAND_TIME),
    ).build()
    for parameter in model.parameters():
        parameter.zero_()
    places: Any = model.position
    tokens, steps = torch.eye(HAND_VOCAB), torch.eye(HAND_TIME)
    model.embedding.weight[:, token] = tokens
    places.weight[:, position] = steps
    model.unembedding.weight[:, answer] = CONFIDENCE * tokens
    sharp = sharpness * math.sqrt(head_dim)  # attention divides scores by the root
    first, second = (_projections(block.mixer) for block in model.blocks)
    first["query"][:head_dim, position] = sharp * steps
    first["key"][1:head_dim, position] = steps[:-1]  # the key of position p answers to the query of p + 1
    first["value"][:HAND_VOCAB, token] = tokens
    first["output"][before, :HAND_VOCAB] = tokens
    second["query"][:HAND_VOCAB, token] = sharp * tokens
    second["key"][:HAND_VOCAB, before] = tokens
    second["value"][:HAND_VOCAB, token] = tokens
    second["output"][answer, :HAND_VOCAB] = tokens
    draws = torch.Generator().manual_seed(seed)
    for layer in (first, second):
        for name in ("query", "key", "value", "output"):
            shape = (head_dim, dim) if name != "output" else (dim, head_dim)
            low_rank = torch.randn(shape[0], 2, generator=draws) @ torch.randn(2, shape[1], generator=draws)
            weight = layer[name]
            (weight[head_dim:] if name != "output" else weight[:, head_dim:]).copy_(noise * low_rank)
    return model.eval()


def _projections(mixer: Any) -> dict[str, Tensor]:
    return {name: getattr(mixer, name).weight for name in ("query", "key", "value", "output")}


def hand_sequences(count: int, seed: int = 0, *, repeats: int = 2) -> Int[Tensor, "count time"]:
    """Draw sequences for the hand-set model: the beginning, then a block of 11 different tokens, `repeats` times."""
    draws = torch.Generator().manual_seed(seed)
    rows = [1 + torch.randperm(HAND_VOCAB - 1, generator=draws)[:11] for _ in range(count)]
    return torch.stack([torch.cat((torch.tensor([BEGINNING]), row.repeat(repeats))) for row in rows])


def hand_unrelated(count: int, seed: int = 0) -> Int[Tensor, "count time"]:
    """Draw sequences like those of `hand_sequences`, whose second block is another one: nothing is repeated in order.

    As the corrupted input. A repeated one of the same length would leave attention right where queries and keys are
    BOTH corrupted, for their positions match as before.
    """
    first, second = hand_sequences(count, seed), hand_sequences(count, seed + 500)
    half = (first.shape[1] - 1) // 2
    return torch.cat((first[:, : half + 1], second[:, half + 1 :]), 1)


def induction_pairs(lab: Lab, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean rows "0 A B . . C D . . A", the same with the first A replaced, the answers B and other tokens D."""
    draws = torch.Generator().manual_seed(lab.seed)
    tokens = torch.stack(
        [1 + torch.randperm(vocab - 1, generator=draws)[:9] for _ in range(lab.pick(smoke=8, small=64))]
    )
    first = torch.zeros(len(tokens), 1, dtype=torch.int64)
    clean = torch.cat((first, tokens[:, :8], tokens[:, :1]), 1)
    corrupted = clean.clone()
    corrupted[:, 1] = tokens[:, 8]
    return clean, corrupted, clean[:, 2], clean[:, 6]
