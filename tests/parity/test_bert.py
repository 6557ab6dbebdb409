"""BERT against transformers, and the sentence encoder MiniLM on real sentences."""

import pytest
import torch
import transformers
from torch.nn import functional

import paperworks as pw
from paperworks.checkpoints import from_transformers, load_folder, save_folder
from paperworks.core.errors import AssetUnavailable
from paperworks.data.assets import assets
from paperworks.models.encoder import MaskedLMHead, pool, segments_of
from paperworks.nn import LayerNorm, Placement

pytestmark = pytest.mark.parity


def bert(dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        attn_implementation="eager",
    )
    model = transformers.BertForPreTraining(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(lengths=(23, 15)):
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 97, (2, 23), generator=draws)
    kinds = (torch.arange(23) > 11).long().expand(2, -1)
    return tokens, kinds, segments_of(torch.tensor(lengths), 23)


@torch.no_grad()
def test_hidden_states_the_pooler_and_both_heads_equal_transformers():
    theirs = bert()
    ours = from_transformers(theirs)
    tokens, kinds, segments = inputs()
    expected = theirs.bert(tokens, attention_mask=segments, token_type_ids=kinds)
    hidden = ours(tokens, Placement(segments=segments), token_types=kinds)
    real = segments > 0
    assert (hidden - expected.last_hidden_state)[real].abs().max() < 1e-12
    assert (ours.pooler(hidden, segments) - expected.pooler_output).abs().max() < 1e-12
    head = MaskedLMHead(ours, LayerNorm(eps=1e-12)).double()
    head.dense.load_state_dict(theirs.cls.predictions.transform.dense.state_dict())
    head.norm.load_state_dict(theirs.cls.predictions.transform.LayerNorm.state_dict())
    head.unembedding.bias.copy_(theirs.cls.predictions.bias)
    both = theirs(tokens, attention_mask=segments, token_type_ids=kinds)
    assert (head(hidden) - both.prediction_logits)[real].abs().max() < 1e-12


def test_gradients_equal_transformers():
    theirs = bert()
    ours = from_transformers(theirs)
    tokens, kinds, _ = inputs()
    upstream = torch.randn(2, 23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (ours(tokens, token_types=kinds) * upstream).sum().backward()
    (theirs.bert(tokens, token_type_ids=kinds).last_hidden_state * upstream).sum().backward()
    pairs = (
        (ours.embedding.weight, theirs.bert.embeddings.word_embeddings.weight),
        (ours.blocks[1].mixer.key.weight, theirs.bert.encoder.layer[1].attention.self.key.weight),
        (ours.blocks[2].feedforward.down.weight, theirs.bert.encoder.layer[2].output.dense.weight),
    )
    for one, other in pairs:
        assert (one.grad - other.grad).abs().max() < 1e-11


@torch.no_grad()
@pytest.mark.parametrize("saved", ["pre-training", "encoder", "without a pooler"])
def test_files_of_any_of_its_classes_are_read_and_ours_are_read_there(saved, tmp_path):
    theirs = bert(torch.float32)
    base = theirs.bert
    if saved == "without a pooler":
        base.pooler = None
    (theirs if saved == "pre-training" else base).save_pretrained(tmp_path / "theirs")
    ours = load_folder(tmp_path / "theirs")
    tokens, kinds, segments = inputs()
    expected = base(tokens, attention_mask=segments, token_type_ids=kinds).last_hidden_state
    assert (ours(tokens, Placement(segments=segments), token_types=kinds) - expected)[segments > 0].abs().max() < 1e-5
    assert ours.spec.pooler == (saved != "without a pooler")
    if ours.spec.pooler:
        save_folder(ours, tmp_path / "ours")
        back = transformers.BertModel.from_pretrained(tmp_path / "ours").eval()
        found = back(tokens, attention_mask=segments, token_type_ids=kinds)
        assert (found.last_hidden_state - expected)[segments > 0].abs().max() < 1e-5
        assert (
            found.pooler_output - ours.pooler(ours(tokens, Placement(segments=segments), token_types=kinds))
        ).abs().max() < 1e-5


def test_published_sizes():
    """Encoder and pooler: 109,482,240 and 335,141,888 (catalogue)."""
    from dataclasses import replace

    from paperworks.checkpoints.families import lookup

    read_bert = lookup("bert").read

    base = read_bert(transformers.BertConfig().to_dict())
    assert pw.count_parameters(base) == 109_482_240
    large = read_bert(
        transformers.BertConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ).to_dict()
    )
    assert pw.count_parameters(large) == 335_141_888
    assert pw.count_parameters(replace(base, pooler=False)) == 109_482_240 - 768 * 769


@pytest.mark.asset
@torch.no_grad()
def test_minilm_embeds_sentences_as_transformers_does():
    try:
        folder = assets.fetch("minilm")
    except AssetUnavailable as error:
        pytest.skip(str(error))
    ours = pw.load("minilm")
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    rows = [ours.tokenizer.encode(sentence) for sentence in sentences]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    segments = segments_of(lengths)
    embedded = functional.normalize(pool(ours(tokens, Placement(segments=segments)), segments), dim=-1)
    hidden = theirs(tokens, attention_mask=segments).last_hidden_state
    expected = functional.normalize((hidden * segments[..., None]).sum(1) / lengths[:, None], dim=-1)
    assert (embedded - expected).abs().max() < 1e-5
    related, unrelated = embedded[0] @ embedded[1], embedded[0] @ embedded[2]
    assert related > 0.6
    assert unrelated < 0.2
