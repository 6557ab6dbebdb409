"""Mamba (Gu & Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.family import Config, Family, Inexpressible, expect
from paperworks.checkpoints.layout import Rule
from paperworks.models import Block, Decoder
from paperworks.nn import Mamba, RMSNorm


class MambaFamily(Family):
    """A selective mixer in every block, and nothing else."""

    model_type = "mamba"
    architecture = "MambaForCausalLM"
    prefix = "backbone."
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50_280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "time_step_rank": "auto",
        "tie_word_embeddings": True,
        "intermediate_size": None,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "hidden_act": ("silu", "swish"),
        "rms_norm": (True,),
    }
    # of fresh weights, of kernels with the same numbers, of the dtype of sums, and of the files of the authors' code
    inert: ClassVar[frozenset[str]] = frozenset(
        """
        d_inner d_model fused_add_norm initializer_range n_layer pad_vocab_size_multiple rescale_prenorm_residual
        residual_in_fp32 ssm_cfg time_step_floor time_step_init_scheme time_step_max time_step_min time_step_scale
        use_associative_scan use_mambapy
        """.split()  # noqa: SIM905  (read as a list of words)
    )
    # as the first files name the embedding
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {"backbone.embeddings.weight": ("backbone.embedding.weight",)}

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        dim, expand = entries["hidden_size"], int(entries["expand"])
        if (entries["intermediate_size"] or expand * dim) != expand * dim:
            raise ValueError(
                f"Mamba whose intermediate_size is not expand x hidden_size ({expand * dim}) is not read, got "
                f"{entries['intermediate_size']}"
            )
        rank = entries["time_step_rank"]
        norm = RMSNorm(eps=float(entries["layer_norm_epsilon"]))
        mixer = Mamba(
            state=entries["state_size"],
            expand=expand,
            width=entries["conv_kernel"],
            rank=None if rank == "auto" else int(rank),
        )
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=dim,
            depth=entries["num_hidden_layers"],
            tied=bool(entries["tie_word_embeddings"]),
            norm=norm,
            block=Block(norm=norm, mixer=mixer),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        mixer = expect(expect(spec, Decoder, "the model").blocks[0].mixer, Mamba, "the mixer")
        if not mixer.selective:
            raise Inexpressible(["Mamba(selective=False) has no config"])
        config = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "num_hidden_layers": spec.depth,
            "state_size": mixer.state,
            "expand": mixer.expand,
            "conv_kernel": mixer.width,
            "intermediate_size": mixer.expand * spec.dim,
            "layer_norm_epsilon": expect(spec.norm, RMSNorm, "the last norm").eps,
            "tie_word_embeddings": spec.tied,
        }
        return config if mixer.rank is None else config | {"time_step_rank": mixer.rank}

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("backbone.embeddings.weight", ("embedding.weight",)),
            Rule("backbone.norm_f.weight", ("norm.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied),
        ]
        names = {
            "in_proj.weight": "input.weight",
            "conv1d.weight": "convolution.weight",
            "conv1d.bias": "convolution.bias",
            "x_proj.weight": "select.weight",
            "dt_proj.weight": "step.weight",
            "dt_proj.bias": "step.bias",
            "A_log": "log_decay",
            "D": "skip",
            "out_proj.weight": "output.weight",
        }
        for layer in range(spec.depth):
            theirs, ours = f"backbone.layers.{layer}", f"blocks.{layer}"
            found.append(Rule(f"{theirs}.norm.weight", (f"{ours}.mixer_norm.weight",)))
            found += [Rule(f"{theirs}.mixer.{name}", (f"{ours}.mixer.{mine}",)) for name, mine in names.items()]
        return found
