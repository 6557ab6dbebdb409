"""Dictionaries inside a model that finds the indirect object: how well each carries the answer and changes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks import train
from paperworks.interpret import sae
from paperworks.interpret.circuits.patching import Site, logit_difference
from paperworks.interpret.sae.evaluation.attributes import attribute_scores, best_meanings
from paperworks.interpret.sae.evaluation.supervised import (
    Approximation,
    Location,
    agreement,
    approximation,
    least_squares_codes,
    mean_codes,
    sparse_edit,
)
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.papers.circuits.ioi_circuit import ASK, FILLERS, NAMES, TIME
from paperworks.testbeds.planted_features import settings

STEPS = 2000
SWAP = 2  # changes that exchange one code for another: one out, one in
PLACES = (3, 7, 10)  # of the three names
SITES = {
    "third name, after block 0": Site("blocks.0", PLACES[2]),
    "last word, after block 1": Site("blocks.1", -1),
}
SIZES = (NAMES, NAMES, 2)
CHANGES = (1, 2, 4)
KINDS: dict[str, sae.SparseAutoencoderSpec] = {
    "L1, penalty 3": sae.Standard(latents=64, penalty=3.0, decoder="weighted"),
    "L1, penalty 1": sae.Standard(latents=64, penalty=1.0, decoder="weighted"),
    "TopK, k = 3": sae.TopK(latents=64, k=3, aux_k=32, dead_after=50_000),
}


@dataclass(frozen=True)
class Sentences:
    """Sentences of one template. attributes: the answer, the subject, and whether the answer stands first."""

    attributes: Int[Tensor, "n 3"]
    fillers: Int[Tensor, "n time"]

    @classmethod
    def draw(cls, count: int, draws: torch.Generator) -> Sentences:
        """Draw names that differ, in both orders."""
        answer = torch.randint(NAMES, (count,), generator=draws)
        subject = (answer + torch.randint(1, NAMES, (count,), generator=draws)) % NAMES
        first = torch.randint(2, (count,), generator=draws)
        fillers = NAMES + torch.randint(FILLERS, (count, TIME), generator=draws)
        return cls(torch.stack((answer, subject, first), dim=1), fillers)

    def with_other_answers(self, draws: torch.Generator) -> Sentences:
        """The counterfactuals: another answer, which is not the subject; all else as it was."""
        answer, subject = self.attributes[:, 0], self.attributes[:, 1]
        # The other NAMES - 2 names, counted from the answer on without the subject.
        step = torch.randint(1, NAMES - 1, (len(answer),), generator=draws)
        new = (answer + step + (step >= (subject - answer) % NAMES).long()) % NAMES
        return Sentences(torch.cat((new[:, None], self.attributes[:, 1:]), dim=1), self.fillers)

    @property
    def tokens(self) -> Int[Tensor, "n time"]:
        """The tokens that the model reads."""
        answer, subject, first = self.attributes.unbind(dim=1)
        names = torch.stack((torch.where(first == 1, answer, subject), torch.where(first == 1, subject, answer)), dim=1)
        places = torch.tensor(PLACES).expand(len(answer), -1)
        tokens = self.fillers.scatter(1, places, torch.cat((names, subject[:, None]), dim=1))
        tokens[:, -1] = ASK
        return tokens


@dataclass(frozen=True)
class Judged:
    """One dictionary at one site."""

    approximation: Approximation
    success: list[float]  # after CHANGES changes; the supervised one has one number, for its swap
    f1: list[float]
    moved: float
    meaning: float  # mean over features of the F1 of what they say best


def _answers(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(dim=-1)


def _rows(model: DecoderModel, site: Site, sentences: Sentences) -> Float[Tensor, "n dim"]:
    return torch.cat([Location(model, tokens, site).read() for tokens in sentences.tokens.split(2048)])


def judge_site(lab: Lab, model: DecoderModel, site: Site) -> tuple[dict[str, Judged], float]:
    """Scores of every dictionary, and the agreement without any edit."""
    draws = torch.Generator().manual_seed(lab.seed + 11)
    shown = Sentences.draw(lab.pick(smoke=1200, small=20_000), draws)
    tested = Sentences.draw(lab.pick(smoke=32, small=2000), draws)
    others = tested.with_other_answers(draws)
    rows, place = _rows(model, site, shown), Location(model, tested.tokens, site)
    x, target = place.read(), Location(model, others.tokens, site).read()
    attributes, new = tested.attributes, others.attributes[:, 0]
    metric = logit_difference(attributes[:, 0], attributes[:, 1])
    found = {}
    for name, make in (("least squares", least_squares_codes), ("means", mean_codes)):
        dictionary = make(rows, shown.attributes, SIZES)
        edited = dictionary.edit(x, 0, attributes[:, 0], new)
        found[name] = Judged(
            approximation(x, dictionary.reconstruct(attributes), place.run, metric, rows.mean(dim=0)),
            [agreement(place.run, edited, target, _answers)],
            [1.0] * 3,
            float(dictionary.weights(attributes)[:, 0].mean()),
            1.0,
        )
    factor = (64 / float(rows.square().sum(dim=1).mean())) ** 0.5
    steps = lab.pick(smoke=3, small=STEPS)
    for name, spec in KINDS.items():
        sampler = torch.Generator().manual_seed(lab.seed + 12)
        batches = (factor * rows[torch.randint(len(rows), (512,), generator=sampler)] for _ in range(steps))
        autoencoder = fitted(lab, spec, batches, steps, lab.seed, factor * rows[:2048])
        autoencoder.rescale(1 / factor)
        with torch.no_grad():
            latents, reconstruction = autoencoder.encode(rows[:5000]), autoencoder(x)
        edits = [sparse_edit(autoencoder, x, target, count) for count in CHANGES]
        meanings = best_meanings(latents, shown.attributes[:5000], SIZES)
        found[name] = Judged(
            approximation(x, reconstruction, place.run, metric, rows.mean(dim=0)),
            [agreement(place.run, edit.x, target, _answers) for edit in edits],
            attribute_scores(latents, shown.attributes[:5000], SIZES).mean_best(),
            float(edits[CHANGES.index(SWAP)].moved.mean()),
            sum(meaning.f1 for meaning in meanings) / len(meanings),
        )
    return found, agreement(place.run, x, target, _answers)


def fitted(
    lab: Lab, spec: sae.SparseAutoencoderSpec, batches: Iterator[Tensor], steps: int, seed: int, centre: Tensor | None
) -> sae.SparseAutoencoder:
    """Train an autoencoder of 64 dimensions by the recipe of the other papers, gradients clipped to 1."""
    torch.manual_seed(seed)
    model = spec.build(64)
    if centre is not None:
        model.centre(centre)
    training = sae.Training(model, steps)
    with lab.threads(1), lab.progress(f"{type(spec).__name__}, {spec.latents} latents", steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            advance(1)

        train.fit(model, training.loss, lambda epoch: batches, settings(steps, clip=1.0), on_step=after_step)
    return model.eval()
