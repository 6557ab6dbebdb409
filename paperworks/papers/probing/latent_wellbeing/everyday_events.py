"""Sixty everyday events by how pleasant they are, for pairs of scenarios of which one is the more pleasant."""

from __future__ import annotations

import random
from dataclasses import dataclass

# From the most unpleasant to the most pleasant, ten of each level; set by hand before anything was measured.
LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "lost everything in a house fire",
        "broke a leg in a car crash",
        "was robbed on the way home",
        "learned that the illness cannot be cured",
        "was fired in front of everybody",
        "watched the old dog die",
        "was bitten by a snake in the garden",
        "lost the savings to a fraud",
        "was left alone on the wedding day",
        "fell down the stairs and lost consciousness",
    ),
    (
        "failed the final exam",
        "had a painful toothache all night",
        "got food poisoning on holiday",
        "was shouted at by the boss",
        "lost the house keys in the rain",
        "crashed the new bicycle into a wall",
        "was stung by a wasp at lunch",
        "found mould on all of the food",
        "argued bitterly with an old friend",
        "was stuck in a broken lift for hours",
    ),
    (
        "missed the bus to work",
        "spilled coffee on a clean shirt",
        "waited an hour in a cold queue",
        "had to clean a dirty kitchen",
        "forgot an umbrella on a wet day",
        "got a parking ticket",
        "could not sleep because of the noise",
        "burned the toast again",
        "received a boring letter from the tax office",
        "stepped into a cold puddle",
    ),
    (
        "walked to the office",
        "bought a loaf of bread",
        "watered the plants",
        "read the newspaper at breakfast",
        "put the books back on the shelf",
        "took the usual train",
        "washed the dishes after lunch",
        "changed a light bulb",
        "waited for the kettle to boil",
        "wrote a short shopping list",
    ),
    (
        "had a good cup of tea with a neighbour",
        "found a coin on the pavement",
        "heard a favourite song on the radio",
        "received a kind note from a colleague",
        "ate a slice of fresh apple cake",
        "sat in the warm sun for a while",
        "saw a rainbow over the fields",
        "petted a friendly cat",
        "slept well and woke up rested",
        "finished a good book",
    ),
    (
        "won a large prize in the lottery",
        "married the love of a lifetime",
        "was offered the job of a dream",
        "held a healthy newborn baby",
        "was cured of a long illness",
        "won the championship with the team",
        "was reunited with a lost brother",
        "danced all night at a wonderful party",
        "was given a journey around the world",
        "celebrated a birthday with all the best friends",
    ),
)
SUBJECTS = ("My sister", "The teacher", "My neighbour", "A young man", "The old woman", "My friend")


@dataclass(frozen=True)
class Scenarios:
    """Pairs of scenarios about one subject, the more pleasant one first."""

    better: list[str]
    worse: list[str]


def scenario_pairs(events: list[tuple[str, ...]], count: int, draws: random.Random) -> Scenarios:
    """Draw pairs whose events are of different levels, from some events of each level."""
    better, worse = [], []
    for _ in range(count):
        low, high = sorted(draws.sample(range(len(events)), 2))
        subject = draws.choice(SUBJECTS)
        better.append(f"{subject} {draws.choice(events[high])}.")
        worse.append(f"{subject} {draws.choice(events[low])}.")
    return Scenarios(better, worse)


def split(known: int, seed: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Part the events of each level at random: `known` of ten to fit on, the others to test on."""
    draws = random.Random(seed)
    shuffled = [tuple(draws.sample(level, len(level))) for level in LEVELS]
    return [level[:known] for level in shuffled], [level[known:] for level in shuffled]
