"""AFM-on-device: its printed sizes, and Qwen3, which has the same parts, as the oracle."""

import pytest
import torch

from paperworks.models import count_parameters
from paperworks.models.presets.afm import afm, afm_on_device
from paperworks.nn import Attention

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
NAMES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "feedforward_norm",
    "self_attn.q_proj": "mixer.query",
    "self_attn.k_proj": "mixer.key",
    "self_attn.v_proj": "mixer.value",
    "self_attn.o_proj": "mixer.output",
    "self_attn.q_norm": "mixer.query_norm",
    "self_attn.k_norm": "mixer.key_norm",
    "mlp.gate_proj": "feedforward.gate",
    "mlp.up_proj": "feedforward.up",
    "mlp.down_proj": "feedforward.down",
}


def test_the_printed_sizes():
    spec = afm_on_device()
    embedding = spec.vocab_size * spec.dim
    assert embedding / 1e9 == pytest.approx(0.15, abs=0.005)
    assert (count_parameters(spec) - embedding) / 1e9 == pytest.approx(2.58, abs=0.005)
    mixer = spec.block.mixer
    assert isinstance(mixer, Attention)
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim, spec.depth) == (24, 8, 128, 26)
    assert spec.tied


@pytest.mark.parity
@torch.no_grad()
def test_its_parts_are_those_of_qwen3():
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).double().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    ours = afm(32, 2, 4, 48, kv_heads=2, head_dim=8, vocab_size=97).build().double().eval()
    state = theirs.state_dict()
    loaded = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    for layer in range(2):
        for name, own in NAMES.items():
            loaded[f"blocks.{layer}.{own}.weight"] = state[f"model.layers.{layer}.{name}.weight"]
    loaded["unembedding.weight"] = loaded["embedding.weight"]
    ours.load_state_dict(loaded)
    # their angles are float32
    assert (ours(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-5
