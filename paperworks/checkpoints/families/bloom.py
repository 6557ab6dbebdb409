"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100): GPT-2's parts with ALiBi and a norm on the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.families.neox import interleaved_blocks
from paperworks.checkpoints.family import Config, Family, expect
from paperworks.checkpoints.layout import Rule, pair
from paperworks.models import Block, Decoder
from paperworks.nn import MLP, ALiBi, Attention, LayerNorm


class Bloom(Family):
    """Its MLPs have 4 dim units and the tanh form of GELU: no entry says otherwise."""

    model_type = "bloom"
    architecture = "BloomForCausalLM"
    prefix = "transformer."
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 250_880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "apply_residual_connection_post_layernorm": (False,),
        "skip_bias_add": (True,),
        "skip_bias_add_qkv": (False,),
    }
    # how the training program computed the same sums, and the length it trained with
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi",
            "pretraining_tp", "seq_length", "slow_but_exact",
        }
    )  # fmt: skip
    synonyms: ClassVar[Mapping[str, str]] = {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        dim = entries["hidden_size"]
        norm = LayerNorm(eps=float(entries["layer_norm_epsilon"]))
        mixer = Attention(
            heads=entries["n_head"], bias=True, position=ALiBi(), dropout=float(entries["attention_dropout"])
        )
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=dim,
            depth=entries["n_layer"],
            tied=bool(entries["tie_word_embeddings"]),
            init_std=float(entries["initializer_range"]),
            norm=norm,
            embedding_norm=norm,
            block=Block(
                norm=norm,
                mixer=mixer,
                feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
                dropout=float(entries["hidden_dropout"]),
            ),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        expect(mixer.position, ALiBi, "the positions")
        expect(block.feedforward, MLP, "the feedforward part")
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "n_layer": spec.depth,
            "n_head": mixer.heads,
            "layer_norm_epsilon": expect(spec.norm, LayerNorm, "the last norm").eps,
            "tie_word_embeddings": spec.tied,
            "initializer_range": spec.init_std,
            "attention_dropout": mixer.dropout,
            "hidden_dropout": block.dropout,
            "apply_residual_connection_post_layernorm": False,
        }

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("transformer.word_embeddings.weight", ("embedding.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied),
            *pair("transformer.word_embeddings_layernorm", "embedding_norm"),
            *pair("transformer.ln_f", "norm"),
        ]
        return found + interleaved_blocks(spec, layers="transformer.h", attention="self_attention")
