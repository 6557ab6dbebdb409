"""The contract of an adapter: a trainable change on top of a frozen linear layer, whatever that layer is made of."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.nn.linear import bias_of, features, weight_of
from paperworks.nn.spec import Spec


class Delta(nn.Module):
    """The trainable part of an adapter on one layer."""

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Return what is added to the base layer's output."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds")

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the change of the weight that this delta amounts to."""
        raise NotImplementedError(f"{type(self).__name__} does not say its weight")


@dataclass(frozen=True, kw_only=True)
class Adapter(Spec):
    """A method of parameter-efficient adaptation: makes a `Delta` for each chosen layer."""

    def build(self, in_features: int, out_features: int) -> Delta:
        """Return a fresh delta, which adds nothing yet. Raises `ValueError` if the layer is too small for it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


class AdaptedLinear(nn.Module):
    """A linear-like `base`, frozen, and the `delta` that is added to it while `enabled`."""

    def __init__(self, base: nn.Module, delta: Delta, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.delta, self.adapter = base, delta, adapter
        self.in_features, self.out_features = features(base)
        self.enabled = True

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Return base(x) + delta(x)."""
        out = self.base(x)
        return out + self.delta(x).to(out.dtype) if self.enabled else out

    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the weight in effect: the base's, plus the delta's while enabled."""
        base = weight_of(self.base)
        return base + self.delta.weight().to(base.dtype) if self.enabled else base

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return bias_of(self.base)
