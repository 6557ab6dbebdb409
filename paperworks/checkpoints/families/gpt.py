"""GPT (Radford et al. 2018) and GPT-2 (2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.families.activations import read_activation, write_activation
from paperworks.checkpoints.family import Config, Family, expect
from paperworks.checkpoints.layout import Rule, Stacked, pair
from paperworks.models import Block, Decoder, PostNorm
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions

_SIZES: Mapping[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
_SYNONYMS: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# summary_*: of the classification head, which is not part of the model; n_ctx repeats n_positions
_INERT = frozenset(
    {
        "n_ctx", "n_special", "predict_special_tokens", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout",
    }
)  # fmt: skip
_MASKS = ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")


def _write(spec: Decoder, block: Block, mixer: Attention) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_layer": spec.depth,
        "n_head": mixer.heads,
        "n_positions": expect(spec.position, LearnedPositions, "the positions").length,
        "layer_norm_epsilon": expect(block.norm, LayerNorm, "a block's norm").eps,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": mixer.dropout,
        "resid_pdrop": block.dropout,
    }


def _block_rules(spec: Decoder) -> Iterator[Rule]:
    transposed = Stacked(transposed=True)
    for layer in range(spec.depth):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        yield from pair(f"{theirs}.ln_1", f"{ours}.mixer_norm")
        yield from pair(f"{theirs}.ln_2", f"{ours}.feedforward_norm")
        fused = [f"{ours}.mixer.{name}" for name in ("query", "key", "value")]
        yield from pair(f"{theirs}.attn.c_attn", *fused, codec=transposed)
        yield from pair(f"{theirs}.attn.c_proj", f"{ours}.mixer.output", codec=transposed)
        yield from pair(f"{theirs}.mlp.c_fc", f"{ours}.feedforward.up", codec=transposed)
        yield from pair(f"{theirs}.mlp.c_proj", f"{ours}.feedforward.down", codec=transposed)


class GPT1(Family):
    """Post-norm blocks and no last norm; its "gelu" is the tanh form."""

    model_type = "openai-gpt"
    architecture = "OpenAIGPTLMHeadModel"
    prefix = "transformer."
    defaults: ClassVar[Mapping[str, Any]] = {**_SIZES, "vocab_size": 40_478, "n_positions": 512, "afn": "gelu"}
    inert: ClassVar[frozenset[str]] = _INERT
    synonyms: ClassVar[Mapping[str, str]] = _SYNONYMS
    ignorable: ClassVar[tuple[str, ...]] = (*_MASKS, "transformer.position_ids")

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        dim, context, name = entries["n_embd"], entries["n_positions"], entries["afn"]
        mixer = Attention(heads=entries["n_head"], bias=True, dropout=float(entries["attn_pdrop"]))
        activation = read_activation("gelu_new" if name == "gelu" else name)
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=dim,
            depth=entries["n_layer"],
            context=context,
            position=LearnedPositions(length=context),
            tied=bool(entries["tie_word_embeddings"]),
            init_std=float(entries["initializer_range"]),
            dropout=float(entries["embd_pdrop"]),
            norm=None,
            block=Block(
                norm=LayerNorm(eps=float(entries["layer_norm_epsilon"])),
                arrangement=PostNorm(),
                mixer=mixer,
                feedforward=MLP(hidden=4 * dim, activation=activation),
                dropout=float(entries["resid_pdrop"]),
            ),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        name = write_activation(expect(block.feedforward, MLP, "the feedforward part").activation, tanh="gelu")
        if block.feedforward.activation == "gelu":  # type: ignore[union-attr]
            raise ValueError("the MLP has the exact GELU; GPT has the tanh form ('gelu_tanh'), relu or silu")
        return _write(spec, block, mixer) | {"afn": name}

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        return [
            Rule("transformer.tokens_embed.weight", ("embedding.weight",)),
            Rule("transformer.positions_embed.weight", ("position.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied),
            *_block_rules(spec),
        ]


class GPT2(Family):
    """Pre-norm blocks, LayerNorm, learned positions."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    defaults: ClassVar[Mapping[str, Any]] = {
        **_SIZES,
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    # reorder_and_upcast_attn computes the scores of half precision in float32
    inert: ClassVar[frozenset[str]] = _INERT | {"reorder_and_upcast_attn"}
    synonyms: ClassVar[Mapping[str, str]] = _SYNONYMS
    ignorable: ClassVar[tuple[str, ...]] = _MASKS

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        dim, context = entries["n_embd"], entries["n_positions"]
        norm = LayerNorm(eps=float(entries["layer_norm_epsilon"]))
        mixer = Attention(
            heads=entries["n_head"],
            bias=True,
            scale=None if entries["scale_attn_weights"] else 1.0,
            dropout=float(entries["attn_pdrop"]),
        )
        activation = read_activation(entries["activation_function"])
        feedforward = MLP(hidden=entries["n_inner"] or 4 * dim, activation=activation)
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=dim,
            depth=entries["n_layer"],
            context=context,
            position=LearnedPositions(length=context),
            tied=bool(entries["tie_word_embeddings"]),
            init_std=float(entries["initializer_range"]),
            dropout=float(entries["embd_pdrop"]),
            norm=norm,
            block=Block(norm=norm, mixer=mixer, feedforward=feedforward, dropout=float(entries["resid_pdrop"])),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        feedforward = expect(block.feedforward, MLP, "the feedforward part")
        return _write(spec, block, mixer) | {
            "n_inner": feedforward.hidden,
            "activation_function": write_activation(feedforward.activation),
            "scale_attn_weights": mixer.scale is None or mixer.scale != 1.0,
        }

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        return [
            Rule("transformer.wte.weight", ("embedding.weight",)),
            Rule("transformer.wpe.weight", ("position.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied),
            *pair("transformer.ln_f", "norm"),
            *_block_rules(spec),
        ]
