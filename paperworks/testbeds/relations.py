"""A corpus in which relations between words are planted, to be found again as analogies of word vectors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RelationCorpus:
    """Sentences about one thing in one of its forms: a country by its name, its capital, its adjective.

    A sentence is about the word of (country, form). Around it stand words of the country's topic, words of the form's
    usage, and common words of one of a few styles; which style is a taste of each word of its own, that no relation
    explains. So a word's contexts are those of its country and of its form, drowned in what is frequent.

    Attributes:
        countries, forms: the grid; each of its cells is a word.
        topic, usage: words a country, and a form, has for itself.
        styles, common: styles, and common words each has, of Zipf's frequencies.
        length: words a sentence.
        sentences: how many there are.
    """

    countries: int = 20
    forms: tuple[str, ...] = ("name", "capital", "adjective")
    topic: int = 20
    usage: int = 20
    styles: int = 4
    common: int = 40
    length: int = 10
    sentences: int = 20_000

    def __post_init__(self) -> None:
        if self.countries < 2 or len(self.forms) < 2:
            raise ValueError(
                f"an analogy needs two countries and two forms, got {self.countries} and {len(self.forms)}"
            )
        if self.length < 4:
            raise ValueError(f"a sentence has its word and one of each kind, so at least 4 words, got {self.length}")

    def word(self, country: int, form: int) -> str:
        """The word of a cell of the grid."""
        return f"{self.forms[form]}{country}"

    def draw(self, seed: int) -> list[list[str]]:
        """The sentences, each in random order."""
        draws = torch.Generator().manual_seed(seed)
        tastes = torch.rand(self.countries, len(self.forms), self.styles, generator=draws) ** 3
        zipf = 1 / torch.arange(1, self.common + 1)
        kinds = torch.multinomial(
            torch.tensor([0.2, 0.2, 0.6]), self.sentences * (self.length - 1), True, generator=draws
        )
        countries = torch.randint(self.countries, (self.sentences,), generator=draws)
        forms = torch.randint(len(self.forms), (self.sentences,), generator=draws)
        styles = torch.multinomial(tastes[countries, forms], 1, generator=draws)[:, 0]
        shape = (self.sentences, self.length - 1)
        topics = torch.randint(self.topic, shape, generator=draws).tolist()
        usages = torch.randint(self.usage, shape, generator=draws).tolist()
        commons = torch.multinomial(zipf, shape[0] * shape[1], True, generator=draws).view(shape).tolist()
        places = torch.randint(self.length, (self.sentences,), generator=draws).tolist()
        written = []
        rows = zip(
            kinds.view(shape).tolist(), countries.tolist(), forms.tolist(), styles.tolist(), topics, usages, commons,
            places, strict=True,
        )  # fmt: skip
        for kind, country, form, style, topic, usage, common, place in rows:
            sentence = [
                (f"topic{country}_{topic[at]}", f"usage{form}_{usage[at]}", f"common{style}_{common[at]}")[which]
                for at, which in enumerate(kind)
            ]
            written.append([*sentence[:place], self.word(country, form), *sentence[place:]])
        return written

    def questions(self) -> list[tuple[str, str, str, str]]:
        """All (a, b, c, d): a is to b as c is to d, two countries and two forms each."""
        return [
            (self.word(one, p), self.word(one, q), self.word(other, p), self.word(other, q))
            for p, q in permutations(range(len(self.forms)), 2)
            for one, other in permutations(range(self.countries), 2)
        ]


def question_ids(questions: list[tuple[str, str, str, str]], index: dict[str, int]) -> Int[Tensor, "questions 4"]:
    """The questions whose four words are all known, as ids. Raises ValueError when there is none."""
    known = [[index[word] for word in question] for question in questions if all(word in index for word in question)]
    if not known:
        raise ValueError(f"none of {len(questions)} questions has four words that are known")
    return torch.tensor(known)
