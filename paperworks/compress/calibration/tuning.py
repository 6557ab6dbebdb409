"""Training what is continuous in a compressed block, codes frozen: the block fine-tuning of AQLM and QuIP#."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paperworks.compress.linear import CompressedLinear


def tune_block(
    block: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    run: Callable[[int, Tensor], Tensor],
    steps: int = 50,
    lr: float = 1e-4,
) -> list[float]:
    """Make a block's outputs match those it had before it was compressed; in place. Returns the loss of every step.

    Adam on the mean squared error moves the stored tensors that the formats call `continuous` (codebooks, scales, signs
    kept as numbers) and the parameters of norms. Each is trained in float32 and stored in its own type again; where
    that last rounding or the training itself makes the block worse on the batches, everything is put back.

    Args:
        block: a module with compressed linears somewhere inside.
        inputs: what the block is run on, one a batch.
        targets: the outputs it should have, one a batch.
        run: run(index, input) -> output of the block, with whatever else batch number index is called with.
        steps: one batch each, in turn.
        lr: AQLM's 1e-4 by default.

    Raises:
        ValueError: when nothing in the block is continuous, or inputs and targets differ in number.
    """
    if not inputs or len(inputs) != len(targets):
        raise ValueError(f"tuning needs as many inputs as targets, at least one; got {len(inputs)} and {len(targets)}")
    stored = [
        (layer, name, tensor)
        for layer in block.modules()
        if isinstance(layer, CompressedLinear)
        for name, tensor in layer.stored.items()
        if name in layer.format.continuous and tensor.is_floating_point()
    ]
    if not stored:
        raise ValueError(
            "nothing to tune: no compressed layer of this block has continuous tensors; use a format with codebooks or "
            "scales that can be trained, such as AQLM or QuIPSharp(signs='float16')"
        )
    norms = [p for module in block.modules() if type(module).__name__.endswith("Norm") for p in module.parameters()]
    trained_before = {parameter: parameter.requires_grad for parameter in block.parameters()}
    kept = [parameter.detach().clone() for parameter in norms]
    before = _loss(inputs, targets, run)
    masters = [tensor.detach().float().clone().requires_grad_() for _, _, tensor in stored]
    try:
        for parameter in trained_before:
            parameter.requires_grad_(False)
        for parameter in norms:
            parameter.requires_grad_()
        for (layer, name, _), master in zip(stored, masters, strict=True):
            layer._buffers[name] = master
        losses = _descend([*masters, *norms], inputs, targets, run, steps, lr)
    finally:
        for parameter, required in trained_before.items():
            parameter.requires_grad_(required)
            parameter.grad = None
        for (layer, name, tensor), master in zip(stored, masters, strict=True):
            layer._buffers[name] = master.detach().to(tensor.dtype)
    if not _loss(inputs, targets, run) <= before:
        for layer, name, tensor in stored:
            layer._buffers[name] = tensor
        with torch.no_grad():
            for parameter, value in zip(norms, kept, strict=True):
                parameter.copy_(value)
    return losses


def _descend(
    learned: list[Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    run: Callable[[int, Tensor], Tensor],
    steps: int,
    lr: float,
) -> list[float]:
    optimizer = torch.optim.Adam(learned, lr=lr, betas=(0.9, 0.95))
    losses = []
    with torch.enable_grad():
        for step in range(steps):
            index = step % len(inputs)
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.mse_loss(run(index, inputs[index].detach()).float(), targets[index].detach().float())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def _loss(inputs: Sequence[Tensor], targets: Sequence[Tensor], run: Callable[[int, Tensor], Tensor]) -> float:
    """The mean over the batches."""
    total = 0.0
    for index, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        total += float(nn.functional.mse_loss(run(index, x).float(), target.float()))
    return total / len(inputs)
