"""Causal scrubbing: a claim about a circuit becomes a test, by resampling all that it says does not matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.interpret.circuits.causal_scrubbing import Feature, Meaning, Node, Scrubbed, attention_tree, examine
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds import induction_model as small

paper = Paper(
    key="causal-scrubbing",
    title="Causal Scrubbing: a method for rigorously testing interpretability hypotheses",
    authors="Chan, Garriga-Alonso, Goldowsky-Dill, Greenblatt, Nitishinskaya, Radhakrishnan et al.",
    year=2022,
    ref="alignmentforum.org/posts/JvZhhzycHu2Yd57RN",
    family="circuits",
    summary=(
        "A hypothesis says which parts of a model stand for which quantity. Every part is recomputed on another input "
        "that agrees on its quantity, and all others on a random one; how much performance is left is the verdict."
    ),
    implements=(
        "paperworks.interpret.circuits.causal_scrubbing.examine",
        "paperworks.interpret.circuits.causal_scrubbing.scrub",
        "paperworks.interpret.circuits.causal_scrubbing.Meaning",
        "paperworks.interpret.circuits.causal_scrubbing.attention_tree",
    ),
    equation=r"\text{recovered} = \frac{L_{random} - L_{scrubbed}}{L_{random} - L_{model}}",
    usage="""
import torch
from paperworks.interpret.circuits.causal_scrubbing import Meaning, Node, examine

bits = torch.cartesian_prod(torch.arange(2), torch.arange(2))
one, two = (Node(f"x{index}", lambda data, index=index: data[:, index].double()) for index in (0, 1))
network = Node("output", lambda a, b: a + b - 2 * a * b, (one, two))   # x0 xor x1

def error(output, data):
    return (output - (data[:, 0] ^ data[:, 1])).square()

first, second = (Meaning(lambda data, index=index: data[:, index]) for index in (0, 1))
for parts in ({"x0": first, "x1": second}, {"x0": first}):   # the right hypothesis, and one that drops x1
    claim = Meaning(lambda data: data[:, 0] ^ data[:, 1], parts)
    print(sorted(parts), examine(network, claim, bits, error, draws=100).recovered)
""",
    budget_exception="An induction model is trained for each of three seeds: 2 to 4 minutes.",
)


def _bits() -> Int[Tensor, "16 4"]:
    return torch.cartesian_prod(*[torch.tensor([0, 1])] * 4)


def _xor_network(*, parts: bool) -> Node:
    """y = x1 xor x2 at once, or in two parts as (x1 or x2) - (x1 and x2); and a part that reads x3, to no effect."""
    inputs = [Node(f"x{index + 1}", lambda data, index=index: data[:, index].double()) for index in range(4)]
    idle = Node("idle", lambda a: 0 * a, (inputs[2],))
    if not parts:
        return Node("output", lambda a, b, c: a + b - 2 * a * b + c, (inputs[0], inputs[1], idle))
    both = Node("both", lambda a, b: a * b, (inputs[0], inputs[1]))
    either = Node("either", lambda a, b: a + b - a * b, (inputs[0], inputs[1]))
    return Node("output", lambda a, b, c: b - a + c, (both, either, idle))


@paper.claim(
    "The whole model recovers everything, nothing recovers nothing, and a dropped feature shows",
    paper="The trivial hypothesis gives 100%, the empty one the random baseline; XOR of two features",
    kind="exact",
)
def limits(lab: Lab) -> Verdict:
    """Scrub a hand-built XOR network under the right hypothesis, without one feature, and under none."""
    draws = lab.pick(smoke=50, small=1000)

    def bit(index: int) -> Meaning:
        return Meaning(lambda data: data[:, index])

    def error(output: Tensor, data: Tensor) -> Tensor:
        return (output - (data[:, 0] ^ data[:, 1])).square()

    def answer(data: Tensor) -> Tensor:
        return data[:, 0] ^ data[:, 1]

    inputs = {"x1": bit(0), "x2": bit(1)}
    in_parts = Meaning(
        answer,
        {
            "both": Meaning(lambda data: data[:, 0] & data[:, 1], inputs),
            "either": Meaning(lambda data: data[:, 0] | data[:, 1], inputs),
        },
    )

    def score(parts: bool, meaning: Meaning) -> Scrubbed:
        return examine(_xor_network(parts=parts), meaning, _bits(), error, draws=draws, seed=lab.seed)

    right, twofold = score(False, Meaning(answer, inputs)), score(True, in_parts)
    dropped, empty = score(False, Meaning(answer, {"x1": bit(0)})), score(False, Meaning(answer))
    # 16,000 draws of a coin: five standard errors are 2 points of the error, 4 of what is recovered
    return lab.judge(
        checks={
            "the right hypothesis recovers 100%": abs(right.recovered - 1) < 1e-9,
            "also when the answer comes in two parts": abs(twofold.recovered - 1) < 1e-9,
            "without x2 nothing is left, to 5 points": abs(dropped.recovered) < 0.05,
            "no hypothesis gives the random baseline, to 5 points": abs(empty.recovered) < 0.05,
        },
        measured={
            "right": right.recovered,
            "right, in two parts": twofold.recovered,
            "without x2": dropped.recovered,
            "none": empty.recovered,
            "random baseline of the squared error": right.random,
        },
    )


def _sequences(lists: int, pairs: int, vocab: int, seed: int) -> Int[Tensor, "rows time"]:
    """Rows "0 X1 Y1 X2 Y2 ... Q": all of some lists of X with some lists of Y and every X asked for.

    So rows that agree on the X, the Y or the word asked for are many, and a hypothesis has something to resample.
    """
    draws = torch.Generator().manual_seed(seed)
    half = vocab // 2  # one half of the words is asked for, the other half answers; 0 begins
    keys = [1 + torch.randperm(half - 1, generator=draws)[:pairs] for _ in range(lists)]
    values = [half + torch.randperm(half, generator=draws)[:pairs] for _ in range(lists)]
    start = torch.zeros(1, dtype=torch.int64)
    rows = []
    for some in keys:
        for others in values:
            rows += [torch.cat((start, torch.stack((some, others), 1).flatten(), asked[None])) for asked in some]
    return torch.stack(rows)


def _answer(data: Tensor) -> Tensor:
    place = (_keys(data) == data[:, -1:]).int().argmax(1, keepdim=True)
    return _values(data).gather(1, place)[:, 0]


def _loss(logits: Tensor, data: Tensor) -> Tensor:
    return 1 - logits.softmax(-1).gather(1, _answer(data)[:, None])[:, 0]


def _keys(data: Tensor) -> Tensor:
    return data[:, 1:-1:2]


def _values(data: Tensor) -> Tensor:
    return data[:, 2:-1:2]


def _asked(data: Tensor) -> Tensor:
    return data[:, -1]


def _hypothesis(heads: int, *, through: str) -> Meaning:
    """Say that the first heads of layer 1 match the asked word with the words before, and copy what stands there.

    `through`: how keys know the word before: "previous-token head" (the first layer's heads) or "embedding".
    """

    def carried(feature: Feature) -> Meaning:
        return Meaning(feature, {"embed": Meaning(feature)})

    before = {f"0.{head}": Meaning(_keys, {f"0.{head}.v": carried(_keys)}) for head in range(heads)}
    keys = before if through == "previous-token head" else {"embed": Meaning(_keys)}
    copying = {
        f"1.{head}": Meaning(
            _answer,
            {
                f"1.{head}.q": carried(_asked),
                f"1.{head}.k": Meaning(_keys, keys),
                f"1.{head}.v": carried(_values),
            },
        )
        for head in range(heads)
    }
    return Meaning(_answer, copying)


@paper.claim(
    "The induction hypothesis passes the test, and fails without the previous-token head",
    paper="Part 3 of the series (induction heads): hypotheses are scored by the loss they recover, and weak ones fail",
    control="the same hypothesis with keys that read the embedding instead",
)
def induction_is_tested(lab: Lab) -> Verdict:
    """Scrub the hand-set and the trained induction model under both hypotheses."""
    lists = lab.pick(smoke=2, small=6)

    def arm(through: str) -> Callable[[int], dict[str, float]]:
        def recovered(seed: int) -> dict[str, float]:
            # Few words fit the hand-set model; the trained one has never seen anything repeated before position 13.
            hand, few = small.hand_set(0.03, seed), _sequences(2 * lists, 5, small.HAND_VOCAB, seed)
            trained, many = small.induction_model(Lab(lab.scale, seed)), _sequences(lists, 13, small.VOCAB, seed)
            return {
                "recovered, trained": _score(trained, small.HEADS, many, through, seed).recovered,
                "recovered, set by hand": _score(hand, 1, few, through, seed).recovered,
            }

        return recovered

    right, wrong = "keys read the previous-token head", "keys read the embedding"
    verdict = lab.compare(
        arms={right: arm("previous-token head"), wrong: arm("embedding")},
        main=Beats(right, wrong, on="recovered, trained", by=0.6),
        also=[
            AtLeast(right, 0.8, on="recovered, trained"),
            AtMost(wrong, 0.2, on="recovered, trained"),
            AtLeast(right, 0.8, on="recovered, set by hand"),
            AtMost(wrong, 0.2, on="recovered, set by hand"),
        ],
        seeds=3,
        note="Rows '0 X1 Y1 X2 Y2 ... Q' with 5 and 13 pairs. Performance is the probability of the answer, since the "
        "loss in nats of a sure model is mostly that of its sure mistakes. Of the trained model the hypothesis names "
        "all four heads of both layers and says that nothing else matters; more than 100% means that what it leaves "
        "out does harm. Lists that two rows share by chance are what the control still recovers.",
    )
    lab.points("recovered, trained", name="recovered", title="Share of the performance that a hypothesis recovers")
    return verdict


def _score(model: nn.Module, heads: int, data: Tensor, through: str, seed: int) -> Scrubbed:
    return examine(attention_tree(model), _hypothesis(heads, through=through), data, _loss, seed=seed)
