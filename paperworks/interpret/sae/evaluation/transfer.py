"""Whether a sparse autoencoder made for one model serves another: a base model's for its fine-tuned descendant.

Kissane, Krzyzanowski, Conmy & Nanda 2024, "SAEs (usually) Transfer Between Base and Chat Models",
alignmentforum.org/posts/fmwk6qxrpW8d4jvbd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.linear import bias_of, weight_of
from paperworks.interpret.sae.activations import Activations
from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.measures import measure
from paperworks.interpret.sae.splice import Loss, Spliced, loss_recovered
from paperworks.interpret.weights.folding import fold_norms, norm_readers

Model = TypeVar("Model", bound=nn.Module)
Autoencoder = TypeVar("Autoencoder", bound=SparseAutoencoder)


@dataclass(frozen=True)
class Outliers:
    """Positions that are left out of a table, for they are far longer than all others.

    longest: length beyond which a position is one. share: how many positions are. of_square: their share of the sum of
    ||x||^2, which is what they would have of a mean squared error.
    """

    longest: float
    share: float
    of_square: float


@dataclass(frozen=True)
class Transfer:
    """One autoencoder on one model's activations.

    l0, fvu: see `Quality`, without outliers. spliced: the model's loss with the reconstruction in its place; outliers
    pass unchanged. mean: the loss with the mean of the model's activations there. scale: (E ||x||^2 /
    E ||x'||^2)^(1/2): above 1, reconstructions are too short.
    """

    l0: float
    fvu: float
    scale: float
    spliced: Spliced
    mean: float

    @property
    def recovered_over_mean(self) -> float:
        """(mean - spliced) / (mean - clean): 0 where the mean would do as well.

        Zeros in the whole residual stream can make a model's guesses worse than no guess; what is better than they are
        may still tell nothing of the input, which the mean does not either.
        """
        return (self.mean - self.spliced.spliced) / (self.mean - self.spliced.clean)


@dataclass(frozen=True)
class TransferTable:
    """Every autoencoder on every model.

    cells: by (autoencoder, model). outliers: by model.
    """

    cells: Mapping[tuple[str, str], Transfer]
    outliers: Mapping[str, Outliers]


def transfer_table(
    models: Mapping[str, nn.Module],
    autoencoders: Mapping[str, SparseAutoencoder],
    tap: str,
    batches: Iterable[Any],
    loss: Loss,
    *,
    leave_out_first: int = 1,
    outlier: float = 5.0,
    on_each: Callable[[], None] | None = None,
) -> TransferTable:
    """Measure every autoencoder on every model, on the same inputs.

    Args:
        models: by name, such as {"base": ..., "chat": ...}; one tap must be meant in all of them.
        autoencoders: by name, in the models' own units (`rescale` after training on normalized activations).
        tap: where they read.
        batches: inputs of the models and of `loss`: the same for all, so that only models differ; a change of the
            prompts' format (chat templates) is a second table.
        loss: loss(model, batch) -> a mean or (sum, count), as for training.
        leave_out_first: positions at the start of every sequence that are left out and pass the splice unchanged.
        outlier: positions longer than so many medians of the model's lengths are left out as well, and counted.
        on_each: called after each cell.

    Raises ValueError when there is nothing to measure, or no position is left.
    """
    inputs = list(batches)
    if not models or not autoencoders or not inputs:
        raise ValueError("a table needs a model, an autoencoder and a batch at least")
    cells: dict[tuple[str, str], Transfer] = {}
    outliers: dict[str, Outliers] = {}
    for model_name, model in models.items():
        reader = Activations(model, tap, [_input_of(batch) for batch in inputs], leave_out_first=leave_out_first)
        rows = torch.cat(list(reader.rows()))
        lengths = rows.norm(dim=1)
        longest = outlier * float(lengths.median())
        out = lengths > longest
        square = lengths.double().square()
        outliers[model_name] = Outliers(longest, float(out.double().mean()), float(square[out].sum() / square.sum()))
        kept = rows[~out]
        mean: Any = kept.mean(dim=0).expand_as  # in the autoencoder's place
        options: dict[str, Any] = {"leave_out_first": leave_out_first, "longest": longest}
        ablated = loss_recovered(model, tap, mean, inputs, loss, **options)
        baseline = ablated.clean, ablated.zero
        for name, sae in autoencoders.items():
            quality = measure(sae, kept.split(8192))
            spliced = loss_recovered(model, tap, sae, inputs, loss, baseline=baseline, **options)
            scale = norm_mismatch(_written(sae, kept), kept)
            cells[name, model_name] = Transfer(quality.l0, quality.fvu, scale, spliced, ablated.spliced)
            if on_each is not None:
                on_each()
    return TransferTable(cells, outliers)


def _input_of(batch: Any) -> Any:
    """What the model is called with: the tokens of a training batch, which has targets beside them."""
    return batch["tokens"] if isinstance(batch, Mapping) and "targets" in batch else batch


@torch.no_grad()
def _written(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    return torch.cat([sae(part) for part in rows.split(8192)])


def norm_mismatch(source: Float[Tensor, "n dim"], target: Float[Tensor, "m dim"]) -> float:
    """sqrt(E ||target||^2 / E ||source||^2), the one scalar that brings `source` to the scale of `target`.

    `rescaled(sae, norm_mismatch(base, chat))` is the base model's autoencoder at the chat model's scale.
    """
    lengths = [float(rows.double().square().sum(dim=1).mean()) for rows in (source, target)]
    if not all(length > 0 for length in lengths):
        raise ValueError("activations of length 0 on average have no scale to be compared")
    return float((lengths[1] / lengths[0]) ** 0.5)


def rescaled(sae: Autoencoder, factor: float) -> Autoencoder:
    """A copy for activations that are `factor` times as long; see `SparseAutoencoder.rescale`."""
    made = copy.deepcopy(sae)
    made.rescale(factor)
    return made


def decoder_cosines(before: SparseAutoencoder, after: SparseAutoencoder) -> Float[Tensor, " latents"]:
    """For each latent the cosine of its decoder row before and after fine-tuning: 1 where a feature stayed.

    Raises ValueError when the two are not of one shape: one must have been trained on from the other.
    """
    if before.decoder.shape != after.decoder.shape:
        raise ValueError(
            f"decoders of shape {tuple(before.decoder.shape)} and {tuple(after.decoder.shape)} have no latents in "
            "common; for independent dictionaries use `nearest_cosines`"
        )
    return torch.cosine_similarity(before.decoder.detach(), after.decoder.detach(), dim=1)


def gap_closed(transferred: float, tuned: float, native: float) -> float:
    """(transferred - tuned) / (transferred - native): the share of the lost quality that fine-tuning gets back.

    transferred, tuned, native: an error (FVU, say) of the foreign autoencoder, of it after fine-tuning, and of one
    trained on these activations from scratch. Above 1, fine-tuning is better than training from scratch.

    Raises ValueError when the foreign one is no worse than the native one: there is no gap.
    """
    if not transferred > native:
        raise ValueError(
            f"the transferred error {transferred:.4g} is not above the native {native:.4g}: no gap to close"
        )
    return (transferred - tuned) / (transferred - native)


@torch.no_grad()
def rotate_stream(model: Model, rotation: Float[Tensor, "dim dim"]) -> Model:
    """A copy with norms folded whose residual stream is R x, and which computes the same.

    Embeddings and what writes to the stream are turned, W <- R W, and what reads from it turned back, W <- W R^T. Norms
    without gain commute with R: ||R x|| = ||x||. It is the model that no autoencoder of the original can fit, though
    nothing about it is different.

    Args:
        model: a pre-norm decoder whose norms are RMS norms; other libraries' as far as `folding.norm_readers` knows
            them and their layers say `writes_residual`.
        rotation: R, orthogonal.

    Raises ValueError when R is not orthogonal to 1e-4 or of another size, a norm is not an RMS norm of all elements, a
    layer's weight is stored in another form, or no layer says that it writes to the stream.
    """
    for path, module in model.named_modules():
        if callable(getattr(module, "decoded_weight", None)):
            raise ValueError(
                f"{path} ({type(module).__name__}) does not hold its weight as it is: merge adapters and decode weight "
                "formats first"
            )
    if not any(getattr(module, "writes_residual", False) for path, module in model.named_modules() if path):
        raise ValueError(
            f"no layer of {type(model).__name__} has `writes_residual`: set it on those that write to the stream"
        )
    turned = fold_norms(model)
    table: Any = next((module for module in turned.modules() if isinstance(module, nn.Embedding)), None)
    if table is None:
        raise ValueError(f"{type(model).__name__} has no embedding to turn")
    wide = checked_rotation(rotation, table.embedding_dim).double()
    readers = norm_readers(turned)
    for path in readers:
        norm: Any = turned.get_submodule(path)
        if isinstance(norm, nn.LayerNorm) or getattr(norm, "used", len(wide)) != len(wide):
            raise ValueError(
                f"{path} is a {type(norm).__name__} that singles out a direction or some elements; only an RMS norm of "
                "all elements commutes with every rotation"
            )
    for path, module in turned.named_modules():
        if isinstance(module, nn.Embedding):  # of tokens, and learned positions, which are a table too
            module.weight.copy_(module.weight.double() @ wide.T)
        elif path and getattr(module, "writes_residual", False):
            weight_of(module).copy_(wide @ weight_of(module).double())
            bias = bias_of(module)
            if bias is not None:
                bias.copy_(wide @ bias.double())
    for path in dict.fromkeys(linear for linears in readers.values() for linear in linears):
        weight = weight_of(turned.get_submodule(path))
        weight.copy_(weight.double() @ wide.T)
    return turned


@torch.no_grad()
def rotate_autoencoder(sae: Autoencoder, rotation: Float[Tensor, "dim dim"]) -> Autoencoder:
    """A copy for R x: every latent is the function of x it was, and the reconstruction is turned by R."""
    wide = checked_rotation(rotation, sae.dim).double()
    made = copy.deepcopy(sae)
    for parameter in (made.encoder, made.decoder, made.decoder_bias):
        parameter.copy_(parameter.double() @ wide.T)
    return made


def checked_rotation(rotation: Tensor, dim: int) -> Float[Tensor, "dim dim"]:
    """R; raises ValueError when it is not an orthogonal (dim, dim)."""
    if rotation.shape != (dim, dim):
        raise ValueError(f"the stream has {dim} dimensions, the rotation shape {tuple(rotation.shape)}")
    error = float((rotation.double() @ rotation.double().T - torch.eye(dim, device=rotation.device)).abs().max())
    if error > 1e-4:
        raise ValueError(f"the matrix is not orthogonal: R R^T differs from the identity by {error:.2g}")
    return rotation


def random_rotation(
    dim: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "dim dim"]:
    """Draw an orthogonal matrix, uniform over all of them: QR of a normal matrix, signs by the diagonal of R."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    out: Tensor = (q * r.diagonal().sign()).to(dtype)
    return out
