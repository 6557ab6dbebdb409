"""Training steps of a TopK autoencoder beside eai-sparsify and SAELens, and what recording costs a forward pass.

The peers pin other libraries' versions, so they are compared where they can be imported: in an environment of their own
with this package beside them.
"""

import warnings
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import Row, compare
from paperworks.interpret import sae

DIM, LATENTS, K, BATCH, STEPS = 768, 16_384, 32, 1024, 2


def _adam(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)


def _ours(batches: list[torch.Tensor]) -> Callable[[], None]:
    model = sae.TopK(latents=LATENTS, k=K, aux=0.0).build(DIM)
    optimizer = _adam(model)

    def steps() -> None:
        for batch in batches:
            loss, _ = model.loss(batch, 0.5)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()

    return steps


def _sparsify(batches: list[torch.Tensor]) -> Callable[[], None]:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    model = SparseCoder(DIM, SparseCoderConfig(num_latents=LATENTS, k=K))
    optimizer = _adam(model)

    def steps() -> None:
        for batch in batches:
            model.set_decoder_norm_to_unit_norm()
            model(batch).fvu.backward()
            model.remove_gradient_parallel_to_decoder_directions()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def _saelens(batches: list[torch.Tensor]) -> Callable[[], None]:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=DIM, d_sae=LATENTS, k=K))
    optimizer = _adam(model)

    def steps() -> None:
        for number, batch in enumerate(batches):
            step = TrainStepInput(
                sae_in=batch, dead_neuron_mask=None, coefficients={}, n_training_steps=number, is_logging_step=False
            )
            model.training_forward_pass(step).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def training() -> Iterator[Row]:
    batches = [torch.randn(BATCH, DIM) for _ in range(STEPS)]
    for name, peer, bar in (("eai-sparsify", _sparsify, 1.2), ("SAELens", _saelens, 4.0)):
        try:
            theirs = peer(batches)
        except ImportError:
            continue
        row = compare(f"TopK autoencoder, training (peer: {name})", _ours(batches), theirs, bar=bar, blocks=3)
        row.details = {"ours_activations_per_second": BATCH * STEPS / min(row.ours)}
        yield row


@torch.no_grad()
def recording() -> Iterator[Row]:
    import paperworks as pw
    from paperworks.interpret import record

    model = pw.load("smollm2")
    tokens = torch.randint(1000, (2, 256))

    def recorded() -> None:
        with record(model, [f"blocks.{n}" for n in range(30)]):
            model(tokens)

    yield compare(
        "recording all residuals of SmolLM2 (peer: the plain forward)", recorded, lambda: model(tokens), bar=1 / 1.1
    )


def run() -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from training()
        yield from recording()
