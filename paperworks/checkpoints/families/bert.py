"""BERT (Devlin et al. 2018, arXiv:1810.04805): the encoder and its pooler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from paperworks.checkpoints.families.activations import read_activation, write_activation
from paperworks.checkpoints.family import Config, Family, expect
from paperworks.checkpoints.layout import Rule, TensorSource, pair
from paperworks.models import Block, Encoder, PostNorm
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions


class Bert(Family):
    """Post-norm blocks that look both ways; heads of pre-training and of tasks are left out."""

    model_type = "bert"
    architecture = "BertModel"
    prefix = "bert."
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    # of the heads; pooler_*: of the first TensorFlow release, which never used them
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads",
            "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "tie_word_embeddings",
        }
    )  # fmt: skip
    # the masked-language and next-sentence heads, which files of pre-training models carry
    ignorable: ClassVar[tuple[str, ...]] = ("cls.*", "bert.embeddings.position_ids")
    # as the first releases of the library, and the files converted with them, name norms
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "LayerNorm.weight": ("LayerNorm.gamma",),
        "LayerNorm.bias": ("LayerNorm.beta",),
    }

    def spec(self, entries: Config) -> Encoder:
        """The spec of a config, with the pooler."""
        norm = LayerNorm(eps=float(entries["layer_norm_eps"]))
        dropout, context = float(entries["hidden_dropout_prob"]), entries["max_position_embeddings"]
        mixer = Attention(
            heads=entries["num_attention_heads"],
            causal=False,
            bias=True,
            dropout=float(entries["attention_probs_dropout_prob"]),
        )
        feedforward = MLP(hidden=entries["intermediate_size"], activation=read_activation(entries["hidden_act"]))
        return Encoder(
            vocab_size=entries["vocab_size"],
            dim=entries["hidden_size"],
            depth=entries["num_hidden_layers"],
            context=context,
            position=LearnedPositions(length=context),
            token_types=entries["type_vocab_size"],
            embedding_norm=norm,
            norm=None,
            block=Block(norm=norm, arrangement=PostNorm(), mixer=mixer, feedforward=feedforward, dropout=dropout),
            dropout=dropout,
            init_std=float(entries["initializer_range"]),
            pooler=True,
        )

    def fitted(self, spec: Encoder, source: TensorSource) -> Encoder:
        """Without the pooler where the file was saved from a model that had none."""
        found = any(name.removeprefix(self.prefix) == "pooler.dense.weight" for name in source.keys())  # noqa: SIM118
        return spec if found else replace(spec, pooler=False)

    def config(self, spec: Encoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Encoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        feedforward = expect(block.feedforward, MLP, "the feedforward part")
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": mixer.heads,
            "intermediate_size": feedforward.hidden,
            "hidden_act": write_activation(feedforward.activation),
            "max_position_embeddings": expect(spec.position, LearnedPositions, "the positions").length,
            "type_vocab_size": spec.token_types,
            "layer_norm_eps": expect(block.norm, LayerNorm, "a block's norm").eps,
            "hidden_dropout_prob": block.dropout,
            "attention_probs_dropout_prob": mixer.dropout,
            "initializer_range": spec.init_std,
        }

    def rules(self, spec: Encoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("bert.embeddings.word_embeddings.weight", ("embedding.weight",)),
            Rule("bert.embeddings.position_embeddings.weight", ("position.weight",)),
            Rule("bert.embeddings.token_type_embeddings.weight", ("token_type.weight",)),
            *pair("bert.embeddings.LayerNorm", "embedding_norm"),
            *pair("bert.pooler.dense", "pooler.dense"),
        ]
        for layer in range(spec.depth):
            theirs, ours = f"bert.encoder.layer.{layer}", f"blocks.{layer}"
            for name in ("query", "key", "value"):
                found += pair(f"{theirs}.attention.self.{name}", f"{ours}.mixer.{name}")
            found += [
                *pair(f"{theirs}.attention.output.dense", f"{ours}.mixer.output"),
                *pair(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_norm"),
                *pair(f"{theirs}.intermediate.dense", f"{ours}.feedforward.up"),
                *pair(f"{theirs}.output.dense", f"{ours}.feedforward.down"),
                *pair(f"{theirs}.output.LayerNorm", f"{ours}.feedforward_norm"),
            ]
        return found
