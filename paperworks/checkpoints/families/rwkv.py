"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.family import Config, Family, Inexpressible, expect
from paperworks.checkpoints.layout import Reshaped, Rule, pair
from paperworks.models import Block, Decoder
from paperworks.nn import RWKV, LayerNorm, RWKVChannelMix

LAST_EPS = 1e-5  # transformers builds the last norm without the config's epsilon


class RWKVFamily(Family):
    """Blocks of time mixing and of channel mixing in turn: two of ours for one of theirs."""

    model_type = "rwkv"
    architecture = "RwkvForCausalLM"
    prefix = "rwkv."
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50_277,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "attention_hidden_size": None,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }
    # context_length is what the CUDA kernel was compiled for; rescale_every halves weights while they are used, and
    # the stream with them, which the next norm undoes
    inert: ClassVar[frozenset[str]] = frozenset({"context_length", "max_position_embeddings", "rescale_every"})

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        dim, layers = entries["hidden_size"], entries["num_hidden_layers"]
        if (entries["attention_hidden_size"] or dim) != dim:
            raise ValueError(
                f"RWKV whose attention_hidden_size is not hidden_size ({dim}) is not read, got "
                f"{entries['attention_hidden_size']}; no published model is so"
            )
        norm = LayerNorm(eps=float(entries["layer_norm_epsilon"]))
        hidden = entries["intermediate_size"] or 4 * dim
        mixing = Block(norm=norm, mixer=RWKV()), Block(norm=norm, mixer=RWKVChannelMix(hidden=hidden))
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=dim,
            depth=2 * layers,
            block=mixing * layers,
            norm=LayerNorm(eps=LAST_EPS),
            embedding_norm=norm,
            embedding_std=1e-4,
            tied=bool(entries["tie_word_embeddings"]),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        blocks = expect(spec, Decoder, "the model").blocks
        expect(blocks[0].mixer, RWKV, "the first mixer")
        if len(blocks) % 2:
            raise Inexpressible([f"RWKV has blocks of time mixing and channel mixing in turn, got {len(blocks)}"])
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "attention_hidden_size": spec.dim,
            "intermediate_size": expect(blocks[1].mixer, RWKVChannelMix, "the second mixer").hidden or 4 * spec.dim,
            "num_hidden_layers": spec.depth // 2,
            "layer_norm_epsilon": expect(blocks[0].norm, LayerNorm, "a block's norm").eps,
            "tie_word_embeddings": spec.tied,
            "rescale_every": 0,
        }

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("rwkv.embeddings.weight", ("embedding.weight",)),
            Rule("head.weight", ("unembedding.weight",), optional=spec.tied),
            *pair("rwkv.blocks.0.pre_ln", "embedding_norm"),
            *pair("rwkv.ln_out", "norm"),
        ]
        row = Reshaped((1, 1, spec.dim))
        for layer in range(spec.depth // 2):
            theirs = f"rwkv.blocks.{layer}"
            time, channel = f"blocks.{2 * layer}", f"blocks.{2 * layer + 1}"
            found += [*pair(f"{theirs}.ln1", f"{time}.mixer_norm"), *pair(f"{theirs}.ln2", f"{channel}.mixer_norm")]
            for place, ours, blends, linears in (
                ("attention", time, ("key", "value", "receptance"), ("key", "value", "receptance", "output")),
                ("feed_forward", channel, ("key", "receptance"), ("key", "receptance", "value")),
            ):
                where, mine = f"{theirs}.{place}", f"{ours}.mixer"
                found += [Rule(f"{where}.time_mix_{name}", (f"{mine}.blend_{name}",), row) for name in blends]
                found += [Rule(f"{where}.{name}.weight", (f"{mine}.{name}.weight",)) for name in linears]
            found += [
                Rule(f"{theirs}.attention.time_decay", (f"{time}.mixer.log_decay",)),
                Rule(f"{theirs}.attention.time_first", (f"{time}.mixer.bonus",)),
            ]
        return found
