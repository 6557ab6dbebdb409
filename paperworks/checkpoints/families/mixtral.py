"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with a mixture of experts in every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from paperworks.checkpoints.families.llama import SIZES, Mistral
from paperworks.checkpoints.family import Config, expect
from paperworks.checkpoints.layout import Rule
from paperworks.models import Block, Decoder
from paperworks.nn import Experts, TopKRouter


class Mixtral(Mistral):
    """Experts are gated MLPs, chosen by a softmax over the chosen."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    # what the forward pass returns besides logits
    inert: ClassVar[frozenset[str]] = frozenset({"output_router_logits"})
    synonyms: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    rope_base: ClassVar[float] = 1_000_000.0
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = {
        key: parts for key, parts in Mistral.linears.items() if key.startswith("self_attn.")
    }

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        base = super().spec(entries)
        block = base.blocks[0]
        assert block.feedforward is not None
        experts = Experts(
            expert=block.feedforward,
            count=entries["num_local_experts"],
            top=entries["num_experts_per_tok"],
            router=TopKRouter(
                balance=float(entries["router_aux_loss_coef"]), jitter=float(entries["router_jitter_noise"])
            ),
        )
        return replace(base, block=replace(block, feedforward=experts))

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        experts = expect(block.feedforward, Experts, "the feedforward part")
        router = expect(experts.router, TopKRouter, "the router")
        dense = replace(spec, block=(replace(block, feedforward=experts.expert),) * spec.depth)
        return super().config(dense) | {
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.top,
            "router_aux_loss_coef": router.balance,
            "router_jitter_noise": router.jitter,
        }

    def layer_rules(self, block: Block, theirs: str, ours: str) -> Iterator[Rule]:
        """How the tensors of one layer correspond; see `from_module` for those of the module in memory."""
        yield from super().layer_rules(block, theirs, ours)
        place, mine = f"{theirs}.block_sparse_moe", f"{ours}.feedforward"
        yield Rule(f"{place}.gate.weight", (f"{mine}.router.logits.weight",))
        assert isinstance(block.feedforward, Experts)
        for index in range(block.feedforward.count):
            for name, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                yield Rule(f"{place}.experts.{index}.{name}.weight", (f"{mine}.experts.{index}.{part}.weight",))

    def from_module(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict under the names that files have: transformers keeps the experts of a layer in one tensor."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name.endswith(".mlp.experts.gate_up_proj"):
                place = name.removesuffix(".mlp.experts.gate_up_proj") + ".block_sparse_moe.experts"
                for index, fused in enumerate(tensor):
                    found[f"{place}.{index}.w1.weight"], found[f"{place}.{index}.w3.weight"] = fused.chunk(2)
            elif name.endswith(".mlp.experts.down_proj"):
                place = name.removesuffix(".mlp.experts.down_proj") + ".block_sparse_moe.experts"
                found |= {f"{place}.{index}.w2.weight": down for index, down in enumerate(tensor)}
            else:
                found[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = tensor
        return found
