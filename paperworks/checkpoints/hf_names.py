"""Hugging Face's tensor names against ours, by model_type."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from paperworks.checkpoints import hf_bert, hf_bloom, hf_recurrent, hf_t5
from paperworks.checkpoints.layout import Codec, HeadInterleaved, Rule, Stacked
from paperworks.models import Decoder, Encoder, Seq2Seq
from paperworks.nn import Attention, Experts

# Tensors that files and releases of the library name differently.
ALIASES = {"embed_out.weight": ("lm_head.weight",)}  # GPT-NeoX: its files, and the module since transformers 5

# What a file that leaves a tensor out means by it: T5 1.1 as transformers 5 saves it, which ties what was not tied.
STAND_INS = {"lm_head.weight": "shared.weight"}


def rules(kind: str, spec: Decoder | Encoder | Seq2Seq) -> list[Rule]:
    """Return the rules of a model_type for a model of this spec."""
    if isinstance(spec, Seq2Seq):
        return list(hf_t5.t5_rules(spec))
    if isinstance(spec, Encoder):
        return list(hf_bert.bert_rules(spec))
    if kind in ("mamba", "rwkv"):
        return list(hf_recurrent.mamba_rules(spec) if kind == "mamba" else hf_recurrent.rwkv_rules(spec))
    if kind == "bloom":
        return list(hf_bloom.bloom_rules(spec))
    return list({"openai-gpt": _gpt1, "gpt2": _gpt2, "gpt_neox": _neox}.get(kind, _llama_line)(kind, spec))


def ignorable(name: str) -> bool:
    """Return whether a tensor holds nothing that is learned: masks and rotary tables that old files carry."""
    masks = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
    if name in hf_t5.COPIES:
        return True
    return name.startswith(hf_bert.HEADS) or name.endswith((*masks, "inv_freq", "position_ids"))


def _llama_line(kind: str, spec: Decoder) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", ("embedding.weight",))
    yield Rule("model.norm.weight", ("norm.weight",))
    yield Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied)
    norms = {"mixer_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
    if kind == "gemma2":
        norms = {
            "mixer_norm": "input_layernorm",
            "mixer_post_norm": "post_attention_layernorm",
            "feedforward_norm": "pre_feedforward_layernorm",
            "feedforward_post_norm": "post_feedforward_layernorm",
        }
    if kind == "phi3":
        linears = {
            "self_attn.qkv_proj": ("mixer.query", "mixer.key", "mixer.value"),
            "mlp.gate_up_proj": ("feedforward.gate", "feedforward.up"),
        }
    else:
        linears = {f"self_attn.{name[0]}_proj": (f"mixer.{name}",) for name in ("query", "key", "value")}
        linears |= {f"mlp.{name}_proj": (f"feedforward.{name}",) for name in ("gate", "up")}
    linears |= {"self_attn.o_proj": ("mixer.output",), "mlp.down_proj": ("feedforward.down",)}
    for layer, block in enumerate(spec.blocks):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        if isinstance(block.feedforward, Experts):
            yield from _experts(f"{theirs}.block_sparse_moe", f"{ours}.feedforward", block.feedforward.count)
        for name, other in norms.items():
            yield Rule(f"{theirs}.{other}.weight", (f"{ours}.{name}.weight",))
        for other, names in linears.items():
            yield from _linear(f"{theirs}.{other}", [f"{ours}.{name}" for name in names])


def _experts(theirs: str, ours: str, count: int) -> Iterator[Rule]:
    """Yield the names of Mixtral's files; see `unfused` for those of the module in memory."""
    yield Rule(f"{theirs}.gate.weight", (f"{ours}.router.logits.weight",))
    for index in range(count):
        for name, mine in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            yield Rule(f"{theirs}.experts.{index}.{name}.weight", (f"{ours}.experts.{index}.{mine}.weight",))


def unfused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names that files have: transformers keeps Mixtral's experts in one tensor."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            place = name.removesuffix(".mlp.experts.gate_up_proj") + ".block_sparse_moe.experts"
            for index, fused in enumerate(tensor):
                found[f"{place}.{index}.w1.weight"], found[f"{place}.{index}.w3.weight"] = fused.chunk(2)
        elif name.endswith(".mlp.experts.down_proj"):
            place = name.removesuffix(".mlp.experts.down_proj") + ".block_sparse_moe.experts"
            found |= {f"{place}.{index}.w2.weight": down for index, down in enumerate(tensor)}
        elif name.endswith(".mlp.gate.weight"):
            found[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
        else:
            found[name] = tensor
    return found


def _gpt1(kind: str, spec: Decoder) -> Iterator[Rule]:
    yield Rule("transformer.tokens_embed.weight", ("embedding.weight",))
    yield Rule("transformer.positions_embed.weight", ("position.weight",))
    yield Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied)
    yield from _gpt_blocks(spec)


def _gpt2(kind: str, spec: Decoder) -> Iterator[Rule]:
    yield Rule("transformer.wte.weight", ("embedding.weight",))
    yield Rule("transformer.wpe.weight", ("position.weight",))
    yield Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied)
    yield from _layer_norm("transformer.ln_f", "norm")
    yield from _gpt_blocks(spec)


def _gpt_blocks(spec: Decoder) -> Iterator[Rule]:
    transposed = Stacked(transposed=True)
    for layer in range(spec.depth):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        yield from _layer_norm(f"{theirs}.ln_1", f"{ours}.mixer_norm")
        yield from _layer_norm(f"{theirs}.ln_2", f"{ours}.feedforward_norm")
        fused = [f"{ours}.mixer.{name}" for name in ("query", "key", "value")]
        yield from _linear(f"{theirs}.attn.c_attn", fused, transposed)
        yield from _linear(f"{theirs}.attn.c_proj", [f"{ours}.mixer.output"], transposed)
        yield from _linear(f"{theirs}.mlp.c_fc", [f"{ours}.feedforward.up"], transposed)
        yield from _linear(f"{theirs}.mlp.c_proj", [f"{ours}.feedforward.down"], transposed)


def _neox(kind: str, spec: Decoder) -> Iterator[Rule]:
    yield Rule("gpt_neox.embed_in.weight", ("embedding.weight",))
    yield Rule("embed_out.weight", ("unembedding.weight",), optional=spec.tied)
    yield from _layer_norm("gpt_neox.final_layer_norm", "norm")
    for layer, block in enumerate(spec.blocks):
        assert isinstance(block.mixer, Attention)
        theirs, ours = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
        yield from _layer_norm(f"{theirs}.input_layernorm", f"{ours}.mixer_norm")
        yield from _layer_norm(f"{theirs}.post_attention_layernorm", f"{ours}.feedforward_norm")
        interleaved = HeadInterleaved(block.mixer.heads)
        fused = [f"{ours}.mixer.{name}" for name in ("query", "key", "value")]
        yield Rule(f"{theirs}.attention.query_key_value.weight", tuple(f"{name}.weight" for name in fused), interleaved)
        yield Rule(f"{theirs}.attention.query_key_value.bias", tuple(f"{name}.bias" for name in fused), interleaved)
        yield from _linear(f"{theirs}.attention.dense", [f"{ours}.mixer.output"])
        yield from _linear(f"{theirs}.mlp.dense_h_to_4h", [f"{ours}.feedforward.up"])
        yield from _linear(f"{theirs}.mlp.dense_4h_to_h", [f"{ours}.feedforward.down"])


def _layer_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", (f"{ours}.weight",))
    yield Rule(f"{theirs}.bias", (f"{ours}.bias",))


def _linear(theirs: str, ours: list[str], codec: Codec = Stacked()) -> Iterator[Rule]:  # noqa: B008  (frozen)
    yield Rule(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), codec)
    yield Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), Stacked())
