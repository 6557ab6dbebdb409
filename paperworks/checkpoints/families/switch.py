"""Switch Transformers (Fedus et al. 2021, arXiv:2101.03961): T5 with one of many experts a token in sparse layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from paperworks.checkpoints.families.t5 import SIZES, T5, sizes, t5_rules, write_sizes
from paperworks.checkpoints.family import Config, Inexpressible, expect
from paperworks.checkpoints.layout import Rule
from paperworks.models import Block, Seq2Seq
from paperworks.models.presets.t5 import switch
from paperworks.nn import Experts, TopKRouter

UNLIMITED = 2**20  # written as their capacity where an expert takes every token: more than a sequence has


class Switch(T5):
    """A T5 of experts whose capacity is a number of tokens a sequence (`Experts.capacity_tokens`)."""

    model_type = "switch_transformers"
    architecture = "SwitchTransformersForConditionalGeneration"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "d_model": 768,
        "num_layers": 12,
        "num_heads": 12,
        "num_experts": 8,
        "expert_capacity": 64,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "router_jitter_noise": 0.01,
        "router_z_loss_coef": 0.001,
        "router_aux_loss_coef": 0.001,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "is_encoder_decoder": (True,),
        "tie_word_embeddings": (True,),
        "router_bias": (False,),
        "router_ignore_padding_tokens": (False,),
        "router_dtype": ("float32",),
        "router_type": ("tokens_masked",),
        "dense_act_fn": ("relu",),
        "feed_forward_proj": ("relu",),
        "add_cross_attention": (False,),
    }
    # The sparse steps follow from the numbers of layers.
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "add_router_probs", "batch_prioritized_routing", "classifier_dropout", "decoder_sparse_step",
            "encoder_sparse_step", "initializer_factor", "is_decoder", "is_gated_act", "n_positions",
            "num_selected_experts",
        }
    )  # fmt: skip
    stand_ins: ClassVar[Mapping[str, str]] = {}

    def spec(self, entries: Config) -> Seq2Seq:
        """The spec of a config."""
        arguments = sizes(entries)
        router = TopKRouter(
            softmax="before",
            balance=float(entries["router_aux_loss_coef"]),
            z=float(entries["router_z_loss_coef"]),
            jitter=float(entries["router_jitter_noise"]),
        )
        everywhere = switch(
            **arguments,
            experts=entries["num_experts"],
            every=1,
            capacity=None,
            capacity_tokens=None if entries["expert_capacity"] >= UNLIMITED else int(entries["expert_capacity"]),
            router=router,
        )

        def layers(blocks: tuple[Block, ...], sparse: int) -> tuple[Block, ...]:
            # theirs: layers 1, 1 + step ...; with no sparse layer the step is the depth, which makes layer 1 sparse
            step = len(blocks) // sparse if sparse > 0 else len(blocks)
            return tuple(
                block if step == 1 or layer % step == 1 else _dense(block) for layer, block in enumerate(blocks)
            )

        return Seq2Seq(
            encoder=replace(
                everywhere.encoder, block=layers(everywhere.encoder.blocks, entries["num_sparse_encoder_layers"])
            ),
            decoder=replace(
                everywhere.decoder, block=layers(everywhere.decoder.blocks, entries["num_sparse_decoder_layers"])
            ),
        )

    def config(self, spec: Seq2Seq) -> dict[str, Any]:
        """The config of a spec."""
        expect(spec, Seq2Seq, "the model")
        found = [[block.feedforward for block in part.blocks] for part in (spec.encoder, spec.decoder)]
        sparse = [[part for part in stack if isinstance(part, Experts)] for stack in found]
        if not (sparse[0] and sparse[1]):
            raise Inexpressible(["no layer of the encoder, or of the decoder, has Experts"])
        experts = sparse[0][0]
        router = expect(experts.router, TopKRouter, "the router")
        if experts.capacity is not None:
            raise Inexpressible(
                [
                    f"Experts.capacity is {experts.capacity}: Hugging Face counts capacity in tokens a sequence, and "
                    "would lose other tokens than this model; write it with capacity_tokens, or capacity=None"
                ]
            )
        dense = Seq2Seq(
            encoder=replace(spec.encoder, block=tuple(map(_dense, spec.encoder.blocks))),
            decoder=replace(spec.decoder, block=tuple(map(_dense, spec.decoder.blocks))),
        )
        return write_sizes(dense) | {
            "num_experts": experts.count,
            "expert_capacity": experts.capacity_tokens or UNLIMITED,
            "num_sparse_encoder_layers": len(sparse[0]),
            "num_sparse_decoder_layers": len(sparse[1]),
            "router_aux_loss_coef": router.balance,
            "router_z_loss_coef": router.z,
            "router_jitter_noise": router.jitter,
            "router_bias": False,
            "dense_act_fn": "relu",
        }

    def rules(self, spec: Seq2Seq) -> list[Rule]:
        """How the tensors correspond."""
        return list(t5_rules(spec, "mlp"))


def _dense(block: Block) -> Block:
    """The block with the expert itself where there are several."""
    if not isinstance(block.feedforward, Experts):
        return block
    return replace(block, feedforward=block.feedforward.expert)
