"""Handwriting synthesis: pen offsets out, a text in, read through a soft window (Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.models.classic.clipped_backward import clipped_backward
from paperworks.nn import LSTM, Placement, Spec, Tap
from paperworks.nn.mixture_density import StrokeDensity, StrokeMixture
from paperworks.nn.recurrent.recurrence import StateCache

OUTPUT_LIMIT, LSTM_LIMIT = 100.0, 10.0  # as in the paper


@dataclass(frozen=True, kw_only=True)
class Handwriting(Spec):
    """Peephole LSTMs in a deep stack, the first of which moves a window along the text.

    The pen's offset and lift (3 numbers) go to every layer, the window too, and every layer goes to the output. The
    window at step t is w_t = sum_u phi(t, u) c_u over the one-hot characters c_u, u = 1 .. U, with
    phi(t, u) = sum_k alpha_k exp(-beta_k (kappa_k - u)^2) and kappa_t = kappa_{t-1} + exp(.): it only moves forward.
    alpha, beta and the step are the exponential of a linear map of the first layer's state.

    Attributes:
        characters: ids of the text; hidden: cells of each layer; layers: at least 1.
        window: Gaussians of the window; mixture: the density of the next offset.
    """

    characters: int
    hidden: int = 400
    layers: int = 3
    window: int = 10
    mixture: StrokeMixture = field(default_factory=StrokeMixture)

    def validate(self) -> None:
        """Check sizes."""
        for name in ("characters", "hidden", "layers", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Handwriting.{name} must be at least 1, got {getattr(self, name)}")

    def build(self) -> HandwritingModel:
        """The model with freshly initialized weights."""
        return HandwritingModel(self)


class Pen(NamedTuple):
    """State that one step hands to the next."""

    first: tuple[Tensor, ...]  # hidden and cell of the layer that moves the window
    kappa: Float[Tensor, "batch window"]
    window: Float[Tensor, "batch characters"]
    above: list[StateCache]  # of the other layers


class HandwritingModel(nn.Module):
    """The module of `Handwriting`. Taps: `phi` (batch, time, characters + 1), `kappa` (batch, time, window)."""

    def __init__(self, spec: Handwriting) -> None:
        super().__init__()
        self.spec = spec
        layer = LSTM(hidden=spec.hidden, peepholes=True)
        widths = [3 + spec.characters] + [3 + spec.characters + spec.hidden] * (spec.layers - 1)
        built: list[Any] = [layer.build(width) for width in widths]
        for each in built:
            each.output = None  # every layer is read as it is
        self.layers = nn.ModuleList(built)
        self.move = nn.Linear(spec.hidden, 3 * spec.window)
        self.density = spec.mixture.build(spec.hidden * spec.layers)
        self.phi, self.kappa = Tap(), Tap()
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw normal weights of deviation 0.075; the window begins slow and a character wide."""
        for parameter in self.parameters():
            parameter.normal_(0.0, 0.075)
        # exp(-3) characters a step for each Gaussian, where 0 would be past a short text in a few steps
        self.move.bias[2 * self.spec.window :] -= 3.0

    def begin(self, batch: int) -> Pen:
        """The state before the first offset: the window stands before the text and shows nothing."""
        weight = self.move.weight
        zeros = weight.new_zeros(batch, self.spec.hidden)
        above: list[Any] = list(self.layers)[1:]
        caches = [layer.new_cache(batch, 0, weight.dtype, weight.device) for layer in above]
        return Pen(
            (zeros, zeros),
            weight.new_zeros(batch, self.spec.window),
            weight.new_zeros(batch, self.spec.characters),
            caches,
        )

    def forward(
        self,
        strokes: Float[Tensor, "batch time 3"],
        text: Int[Tensor, "batch characters"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch time numbers"]:
        """The outputs at each step, from which `StrokeDensity` makes the density of the NEXT offset.

        Args:
            strokes: offsets x, y and 1 where the pen is lifted after it; text: ids; lengths: of each text, None all.

        Raises:
            ValueError: for shapes that do not belong together, or ids outside the characters.
        """
        if strokes.dim() != 3 or strokes.shape[-1] != 3 or text.dim() != 2 or len(text) != len(strokes):
            raise ValueError(
                f"strokes must be (batch, time, 3) and text (batch, characters), got {tuple(strokes.shape)} and "
                f"{tuple(text.shape)}"
            )
        if int(text.min()) < 0 or int(text.max()) >= self.spec.characters:
            raise ValueError(f"the text has ids from {int(text.min())} to {int(text.max())}, outside the "
                             f"{self.spec.characters} characters there are")  # fmt: skip
        return self.write(strokes, self.characters(text, lengths), self.begin(len(text)))[0]

    def characters(
        self, text: Int[Tensor, "batch characters"], lengths: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch characters kinds"]:
        """one-hot characters, zeros beyond the length of each text."""
        shown = F.one_hot(text, self.spec.characters).to(self.move.weight.dtype)
        if lengths is None:
            return shown
        return shown * (torch.arange(text.shape[1], device=text.device) < lengths[:, None])[..., None]

    def write(
        self, strokes: Float[Tensor, "batch time 3"], shown: Float[Tensor, "batch characters kinds"], pen: Pen
    ) -> tuple[Float[Tensor, "batch time numbers"], Pen]:
        """The outputs of some steps and the state after them."""
        hidden, windows, pen = self._read(strokes, shown, pen)
        states, given = [hidden], torch.cat((strokes, windows), -1)
        for layer, cache in zip(list(self.layers)[1:], pen.above, strict=True):
            placement = Placement().resolve(len(strokes), strokes.shape[1], strokes.device).at(cache)
            states.append(layer(clipped_backward(torch.cat((given, states[-1]), -1), LSTM_LIMIT), placement))
        return clipped_backward(self.density(torch.cat(states, -1)), OUTPUT_LIMIT), pen

    def _read(self, strokes: Tensor, shown: Tensor, pen: Pen) -> tuple[Tensor, Tensor, Pen]:
        """Run the layer that moves the window: it hears what the window showed one step before."""
        first: Any = self.layers[0]
        places = torch.arange(1, shown.shape[1] + 2, device=shown.device, dtype=shown.dtype)
        state, kappa, window = pen.first, pen.kappa, pen.window
        trail: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for offset in strokes.unbind(1):
            given = first.project(torch.cat((offset, window), -1))
            state = first.step(clipped_backward(given, LSTM_LIMIT), state)
            alpha, beta, forward = self.move(state[0]).exp().chunk(3, -1)
            kappa = kappa + forward
            away = (kappa[..., None] - places).square()
            phi = (alpha[..., None] * torch.exp(-beta[..., None] * away)).sum(1)
            window = (phi[:, :-1, None] * shown).sum(1)
            trail.append((state[0], window, phi, kappa))
        hidden, windows, phis, kappas = (torch.stack(part, 1) for part in zip(*trail, strict=True))
        self.phi(phis)
        self.kappa(kappas)
        return hidden, windows, Pen(state, kappa, window, pen.above)


def handwriting_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]]]:
    """-log p of the strokes, summed over the steps of a row and averaged over rows; and the mean a step.

    batch: strokes (batch, time, 3), which of them are no padding (batch, time), text (batch, characters), its lengths.
    """
    nats = stroke_nats(model, batch)
    return nats.sum() / len(nats), {"nats a step": (nats.sum(), batch[1][:, 1:].sum())}


def stroke_nats(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Float[Tensor, "batch steps"]:
    """-log p of each offset but the first, given those before it and the text; 0 where there is padding."""
    strokes, real, text, lengths = batch
    density = StrokeDensity(model(strokes[:, :-1], text, lengths))
    return -density.log_prob(strokes[:, 1:, :2], strokes[:, 1:, 2] > 0.5) * real[:, 1:]


@torch.no_grad()
def synthesize(
    model: HandwritingModel,
    text: Int[Tensor, " characters"],
    *,
    most: int,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "time 3"], Float[Tensor, "time places"], Bool[Tensor, ""]]:
    """Write one text; return offsets with lifts, the window phi at each step, and whether the writing was ended.

    It ends when phi is larger one place beyond the last character than at every character, or after
    `most` steps. `bias` makes it neater: see `StrokeDensity`. The first offset given to the model is none at all.
    """
    shown, pen = model.characters(text[None]), model.begin(1)
    given, written, seen = shown.new_zeros(1, 1, 3), list[Tensor](), list[Tensor]()
    handle = model.phi.register_forward_hook(lambda _, inputs, output: seen.append(output[0, 0]))
    ended = False
    try:
        while len(written) < most and not ended:
            outputs, pen = model.write(given, shown, pen)
            offset, lifted = StrokeDensity(outputs[:, 0], bias).sample(generator)
            given = torch.cat((offset, lifted[:, None].to(offset.dtype)), 1)[:, None]
            written.append(given[0, 0])
            ended = bool(seen[-1][-1] > seen[-1][:-1].max())
    finally:
        handle.remove()
    return torch.stack(written), torch.stack(seen), torch.tensor(ended)
