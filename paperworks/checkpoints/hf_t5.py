"""T5 and Switch Transformers in the Hugging Face layout: their configs and their tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from paperworks.checkpoints.layout import Rule
from paperworks.models import Seq2Seq
from paperworks.models.presets.t5 import switch, t5
from paperworks.nn import MLP, Attention, Experts, GatedMLP, RelativeBuckets, TopKRouter

Config = Mapping[str, Any]

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the shared table, in old files


def read_t5(config: Config) -> Seq2Seq:
    """Return the spec of a T5 config, of the first version or 1.1 (gated, untied).

    Raises ValueError for options that no published checkpoint has.
    """
    kind = config.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise ValueError(
            f"T5 with feed_forward_proj={kind!r} is not read; published checkpoints have relu or gated-gelu"
        )
    depth = config["num_layers"]
    if (config.get("num_decoder_layers") or depth) != depth:
        raise ValueError("T5 whose decoder has another depth than its encoder is not read; published models have one")
    return t5(
        dim=config["d_model"],
        hidden=config["d_ff"],
        depth=depth,
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        vocab_size=config["vocab_size"],
        gated=kind == "gated-gelu",
        # a module in memory says so by another entry: transformers 5 calls every T5 tied, and version 1.1 is not
        tied=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        dropout=float(config.get("dropout_rate", 0.1)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
    )


def write_t5(spec: Seq2Seq) -> dict[str, Any]:
    """Return the config of a T5 model; raises ValueError for another one."""
    encoder, decoder = spec.encoder, spec.decoder
    block = encoder.blocks[0]
    mixer, feedforward = block.mixer, block.feedforward
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, RelativeBuckets)
        and isinstance(feedforward, MLP | GatedMLP)
    ):
        raise ValueError("T5 has attention with relative buckets and an MLP in every block")
    return {
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.dim,
        "d_kv": mixer.head_size(encoder.dim),
        "d_ff": feedforward.hidden,
        "num_layers": encoder.depth,
        "num_decoder_layers": decoder.depth,
        "num_heads": mixer.heads,
        "relative_attention_num_buckets": mixer.position.buckets,
        "relative_attention_max_distance": mixer.position.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": block.norm.eps,  # type: ignore[attr-defined]
        "feed_forward_proj": "gated-gelu" if isinstance(feedforward, GatedMLP) else "relu",
        "tie_word_embeddings": decoder.tied,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def read_switch(config: Config) -> Seq2Seq:
    """Return the spec of a Switch Transformer's config.

    Their capacity is a number of tokens a sequence and expert, ours a share of a call: no token is lost here.
    Raises ValueError for options that no published checkpoint has.
    """
    for option in ("router_bias", "router_ignore_padding_tokens"):
        if config.get(option):
            raise ValueError(f"Switch with {option}=true is not read; published checkpoints have it off")
    depth = config["num_layers"]
    # a module in memory says the step; a file the number of sparse layers too
    every = config.get("encoder_sparse_step") or depth // config["num_sparse_encoder_layers"]
    same = (config.get("decoder_sparse_step") or every) == every
    if (config.get("num_decoder_layers") or depth) != depth or not same:
        raise ValueError("Switch whose decoder has other layers than its encoder is not read; published models do not")
    if config.get("dense_act_fn", "relu") != "relu":
        raise ValueError(f"Switch with dense_act_fn={config['dense_act_fn']!r} is not read; published ones have relu")
    return switch(
        dim=config["d_model"],
        hidden=config["d_ff"],
        depth=depth,
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        experts=config["num_experts"],
        every=every,
        capacity=None,
        router=TopKRouter(
            softmax="before",
            balance=float(config.get("router_aux_loss_coef", 0.001)),
            z=float(config.get("router_z_loss_coef", 0.001)),
            jitter=float(config.get("router_jitter_noise", 0.01)),
        ),
        vocab_size=config["vocab_size"],
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        dropout=float(config.get("dropout_rate", 0.1)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
    )


def write_switch(spec: Seq2Seq) -> dict[str, Any]:
    """Return the config of a Switch Transformer; raises ValueError for another model, or one that loses tokens."""
    sparse = [layer for layer, block in enumerate(spec.encoder.blocks) if isinstance(block.feedforward, Experts)]
    experts = spec.encoder.blocks[sparse[0]].feedforward if sparse else None
    if not (isinstance(experts, Experts) and isinstance(experts.router, TopKRouter) and experts.top == 1):
        raise ValueError("Switch has one expert a token, chosen by TopKRouter, in some layers")
    if experts.capacity is not None:
        raise ValueError(
            "Hugging Face counts capacity in tokens a sequence, and would lose others than this model: write it with "
            "capacity=None in its Experts"
        )
    every = sparse[0] + 1
    dense = Seq2Seq(encoder=_dense(spec.encoder), decoder=_dense(spec.decoder))
    config = write_t5(dense)
    del config["feed_forward_proj"]
    count = spec.encoder.depth // every
    return config | {
        "num_experts": experts.count,
        "expert_capacity": 2**20,  # of a sequence's tokens: all of them
        "num_sparse_encoder_layers": count,
        "num_sparse_decoder_layers": count,
        "encoder_sparse_step": every,
        "decoder_sparse_step": every,
        "router_aux_loss_coef": experts.router.balance,
        "router_z_loss_coef": experts.router.z,
        "router_jitter_noise": experts.router.jitter,
        "router_bias": False,
        "dense_act_fn": "relu",
    }


def _dense(stack: Any) -> Any:
    """Return the stack with the expert itself where there are several."""
    blocks = tuple(
        replace(block, feedforward=block.feedforward.expert) if isinstance(block.feedforward, Experts) else block
        for block in stack.blocks
    )
    return replace(stack, block=blocks)


def t5_rules(spec: Seq2Seq) -> Iterator[Rule]:
    """Yield the names of the tensors of a T5 model, or of a Switch Transformer."""
    stacks = (spec.encoder, spec.decoder)
    sparse = any(isinstance(block.feedforward, Experts) for stack in stacks for block in stack.blocks)
    yield Rule("shared.weight", ("encoder.embedding.weight",))
    yield Rule("lm_head.weight", ("decoder.unembedding.weight",), optional=spec.decoder.tied)
    for stack in ("encoder", "decoder"):
        yield Rule(f"{stack}.final_layer_norm.weight", (f"{stack}.norm.weight",))
        yield Rule(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{stack}.blocks.0.mixer.relative.weight",),
        )
        for layer in range(getattr(spec, stack).depth):
            theirs, ours = f"{stack}.block.{layer}.layer", f"{stack}.blocks.{layer}"
            parts = [("0.SelfAttention", "mixer")]
            parts += [("1.EncDecAttention", "cross")] if stack == "decoder" else []
            for index, (name, mine) in enumerate(parts):
                yield Rule(f"{theirs}.{index}.layer_norm.weight", (f"{ours}.{mine}_norm.weight",))
                for letter, linear in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                    yield Rule(f"{theirs}.{name}.{letter}.weight", (f"{ours}.{mine}.{linear}.weight",))
            last = len(parts)
            yield Rule(f"{theirs}.{last}.layer_norm.weight", (f"{ours}.feedforward_norm.weight",))
            feedforward = getattr(spec, stack).blocks[layer].feedforward
            place = f"{theirs}.{last}.{'mlp' if sparse else 'DenseReluDense'}"
            if isinstance(feedforward, Experts):
                yield Rule(f"{place}.router.classifier.weight", (f"{ours}.feedforward.router.logits.weight",))
                for index in range(feedforward.count):
                    yield from _mlp(f"{place}.experts.expert_{index}", f"{ours}.feedforward.experts.{index}", False)
            else:
                yield from _mlp(place, f"{ours}.feedforward", isinstance(feedforward, GatedMLP))


def _mlp(theirs: str, ours: str, gated: bool) -> Iterator[Rule]:
    names = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
    for name, mine in (*names, ("wo", "down")):
        yield Rule(f"{theirs}.{name}.weight", (f"{ours}.{mine}.weight",))
