"""A trained dense model becomes a mixture of experts by copies (Komatsuzaki et al. 2022, arXiv:2212.05055)."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.core.initialization import initialize
from paperworks.models.block import Block
from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.surgery.rebuilding import rebuilt, require_plain
from paperworks.nn import Experts, NoisyTopKRouter, Router, TopKRouter


@torch.no_grad()
def upcycle(
    model: DecoderModel,
    count: int,
    top: int = 2,
    *,
    router: Router | None = None,
    layers: Iterable[int] | None = None,
) -> DecoderModel:
    """A copy of `model` whose feed-forward parts are each copied into `count` experts, with the same logits.

    Equal experts with weights that sum to 1 are one expert, whatever the router chooses; so nothing is lost, and what
    training then makes different is gained. Routers are drawn as at initialization, from torch's global generator.
    Memory grows to `count` feed-forward parts a layer; optimizer states of the old model do not fit the new one.

    Args:
        model: a decoder with plain weights (merge adapters, load weights uncompressed); it is left as it is.
        count: experts a layer.
        top: experts a token goes to.
        router: what chooses; its weights must sum to 1. The default is Mixtral's, `TopKRouter()`. Give it balance and
            z losses for training.
        layers: which blocks, by index from 0; None for all.

    Raises:
        ValueError: for a router whose weights do not sum to 1, a layer that does not exist, has no feed-forward part or
            is a mixture already, or (from `Experts`) counts that do not fit.
        TypeError: when the model holds other weights than its spec builds: adapters, compressed ones.
    """
    router = TopKRouter() if router is None else router
    _require_weights_that_sum_to_one(router)
    chosen = _chosen(model.spec, layers)
    require_plain(model)
    blocks = list(model.spec.blocks)
    for layer in chosen:
        dense = blocks[layer].feedforward
        assert dense is not None  # `_chosen` has looked
        blocks[layer] = replace(blocks[layer], feedforward=Experts(expert=dense, count=count, top=top, router=router))
    uniform = not isinstance(model.spec.block, tuple) and len(chosen) == model.spec.depth
    spec = replace(model.spec, block=blocks[0] if uniform else tuple(blocks))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in chosen:
        prefix = f"blocks.{layer}.feedforward."
        for name in [name for name in state if name.startswith(prefix)]:
            copied, rest = state.pop(name), name.removeprefix(prefix)
            for index in range(count):
                place = f"{prefix}experts.{index}.{rest}"
                state[place] = copied.clone() if index else copied
                trainable[place] = trainable.get(name, True)
        for name, tensor in _fresh_router(model, router, count, top).items():
            state[f"{prefix}router.{name}"] = tensor
    return rebuilt(model, spec, state, trainable)


def _require_weights_that_sum_to_one(router: Router) -> None:
    if isinstance(router, NoisyTopKRouter):
        return
    if isinstance(router, TopKRouter):
        if router.softmax == "before" and not router.renormalize:
            raise ValueError(
                "the weights of TopKRouter(softmax='before') sum to less than 1, so copies of one expert would give "
                "less than it did: use softmax='after' or renormalize=True"
            )
        if router.second == "random":
            raise ValueError(
                "TopKRouter(second='random') leaves out second experts in training, and with them part of the output: "
                "use second='top'"
            )
        return
    raise ValueError(f"{type(router).__name__} is not known to give weights that sum to 1: use TopKRouter()")


def _chosen(spec: Decoder, layers: Iterable[int] | None) -> list[int]:
    chosen = list(range(spec.depth)) if layers is None else sorted(set(layers))
    if not chosen:
        raise ValueError("layers is empty: name at least one block, or None for all")
    for layer in chosen:
        if not 0 <= layer < spec.depth:
            raise ValueError(f"there is no block {layer}; this model has blocks 0 to {spec.depth - 1}")
        block: Block = spec.blocks[layer]
        if block.feedforward is None:
            raise ValueError(f"block {layer} has no feed-forward part to copy; name other layers")
        if isinstance(block.feedforward, Experts):
            raise ValueError(f"block {layer} is a mixture of experts already; name the dense layers")
    return chosen


def _fresh_router(model: DecoderModel, router: Router, count: int, top: int) -> dict[str, Tensor]:
    """A router's weights as a new model has them."""
    module = router.build(model.spec.dim, count, top)
    initialize(module, model.spec.init, std=model.spec.init_std)
    return {name: tensor.to(model.device, model.dtype) for name, tensor in module.state_dict().items()}
