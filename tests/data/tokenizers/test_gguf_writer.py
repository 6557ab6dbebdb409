"""Tokenizers written as GGUF metadata: read back, they give the same ids, or they are refused."""

import json
import random

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from paperworks.core.errors import AssetUnavailable
from paperworks.data.assets import assets
from paperworks.data.tokenizers.files import SpecialTokens
from paperworks.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from paperworks.generation import generate

PROSE = [
    "the quick brown fox jumps over the lazy dog 1234 times",
    "hello world, hello again; naïve café",
    "a b  c\n\nd",
]
NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "mpt")


def awkward_texts(count=200):
    chance = random.Random(0)
    pieces = [*"abcdehlo 0123\n\t.,'", "  ", "é", "e\u0301", "🦊", "HELLO", "hello", " world", "<|endoftext|>", "don't"]
    return ["".join(chance.choice(pieces) for _ in range(chance.randrange(1, 20))) for _ in range(count)]


def assert_same_ids(one, other):
    for text in [*PROSE, *awkward_texts()]:
        assert other.encode(text) == one.encode(text), text


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PROSE, 330)


def test_a_trained_vocabulary_reads_back_with_the_same_ids(bpe):
    metadata = bpe.gguf_metadata()
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    again = Tokenizer.from_gguf(metadata)
    assert_same_ids(bpe, again)
    assert (again.bos, again.eos, again.stop_ids, again.vocab_size) == (bpe.bos, bpe.eos, bpe.stop_ids, bpe.vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_from_gguf_is_written_as_it_was(bpe, name):
    original = bpe.gguf_metadata() | {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.bos_token_id": bpe.eos,
        "tokenizer.ggml.padding_token_id": bpe.eos,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert Tokenizer.from_gguf(original).gguf_metadata() == original


def test_single_digits_may_be_said_in_other_words(bpe):
    backend = Backend.from_str(bpe.backend.to_str())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer = Tokenizer(backend)
    assert tokenizer.gguf_metadata()["tokenizer.ggml.pre"] == "smollm"
    assert_same_ids(tokenizer, Tokenizer.from_gguf(tokenizer.gguf_metadata()))


def test_a_post_processor_that_begins_a_text_is_written_as_such(bpe):
    backend = Backend.from_str(bpe.backend.to_str())
    end = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{end}:0 $A:0", special_tokens=[(end, 0)])
    tokenizer = Tokenizer(backend, SpecialTokens(bos=end))
    again = Tokenizer.from_gguf(tokenizer.gguf_metadata())
    assert again.encode("hello")[0] == tokenizer.encode("hello")[0] == again.bos == 0
    assert_same_ids(tokenizer, again)


def test_ids_that_no_token_has_are_filled_and_read_as_no_text(bpe):
    described = json.loads(bpe.backend.to_str())
    described["added_tokens"].append(described["added_tokens"][0] | {"id": 340, "content": "<|far|>"})
    tokenizer = Tokenizer(Backend.from_str(json.dumps(described)))
    far = tokenizer.backend.token_to_id("<|far|>")
    metadata = tokenizer.gguf_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == far + 1 == len(set(tokens))
    assert_same_ids(tokenizer, Tokenizer.from_gguf(metadata))


def pieces(prefix):
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlo"]
    merges = [("▁", "h"), ("l", "l"), ("▁h", "e"), ("h", "e"), ("▁", "he"), ("ll", "o"), ("▁he", "llo")]
    for merge in merges:
        if "".join(merge) not in vocabulary:
            vocabulary.append("".join(merge))
    # Merges in the order of their pieces' scores, as SentencePiece vocabularies are converted.
    order = ["▁h", "ll", "▁he", "he", "llo", "▁hello"]
    merges.sort(key=lambda merge: (order.index("".join(merge)), len(merge[0])))
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, SpecialTokens(bos="<s>", eos="</s>", unk="<unk>", add_bos=True))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_become_scores_that_order_them_alike(prefix):
    tokenizer = pieces(prefix)
    metadata = tokenizer.gguf_metadata()
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    kinds = metadata["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[3], kinds[-1]) == (2, 3, 6, 1)
    assert_same_ids(tokenizer, Tokenizer.from_gguf(metadata))


def test_sentencepiece_merges_that_scores_cannot_express_are_refused():
    described = json.loads(pieces(True).backend.to_str())
    described["model"]["merges"].remove(["▁", "he"])  # scores would join these too
    tokenizer = Tokenizer(Backend.from_str(json.dumps(described)), SpecialTokens(unk="<unk>"))
    with pytest.raises(ValueError, match="cannot express this tokenizer's merges"):
        tokenizer.gguf_metadata()


@pytest.mark.parametrize(
    "cutter",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x"), "isolated"), pre_tokenizers.ByteLevel(False)]),
    ],
)
def test_rules_without_a_name_are_refused(bpe, cutter):
    backend = Backend.from_str(bpe.backend.to_str())
    backend.pre_tokenizer = cutter
    with pytest.raises(ValueError, match="no name known here for the rules"):
        Tokenizer(backend).gguf_metadata()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abc")], ids=["bytes", "characters"])
def test_vocabularies_without_merges_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"BPE without merges.*huggingface"):
        tokenizer.gguf_metadata()


@pytest.mark.slow
def test_smollm2_exported_with_its_tokenizer_reads_back_and_writes_the_same(tmp_path):
    import paperworks as pw

    try:
        assets.fetch("smollm2")
    except AssetUnavailable as missing:
        pytest.skip(str(missing))
    model = pw.load("smollm2")
    pw.export(model, tmp_path / "again.gguf", layout="gguf", kind="F32")
    again = pw.load(tmp_path / "again.gguf")
    assert_same_ids(model.tokenizer, again.tokenizer)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert again.tokenizer.stop_ids == model.tokenizer.stop_ids
    prompts = ["Once upon a time", "The capital of France is"]
    written = generate(model, prompts, max_new_tokens=8, temperature=0.0)
    assert generate(again, prompts, max_new_tokens=8, temperature=0.0) == written
