"""Tokenizers: text survives the round trip, streams break no character, files and GGUF metadata are checked."""

import itertools
import json
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.core.errors import CorruptFile
from paperworks.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe

PROSE = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "In 1984 there were 12,345 foxes; don't ask how many dogs they'd jumped over.",
    "def jump(fox, dog):\n    return fox.over(dog)  # 100%\n",
    "Füchse springen über Hunde. Лиса прыгает. 狐が犬を飛び越える。🦊🐕",
] * 3
AWKWARD = [
    "",
    " ",
    "  a  b\n\n\tc ",
    "naïve café",
    "👩‍👩‍👧‍👦 family",
    "\u0000\u0001\x7f",
    "a\r\nb",
    "<|endoftext|>",
    "\ufffd",
    "e\u0301",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PROSE, 400)


def gguf_metadata(tokenizer, **changes):
    """Describe a byte-level tokenizer the way a GGUF file does."""
    content = json.loads(tokenizer.backend.to_str())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "bos_token_id": vocabulary["<|endoftext|>"],
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize("text", [*PROSE[:4], *AWKWARD])
def test_byte_level_text_survives_the_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text), skip_special=False) == text
    assert bpe.decode(bpe.encode(text, special=False)) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_byte_tokenizer(text):
    tokenizer = BYTES
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


BYTES = ByteTokenizer()


def test_byte_ids_are_the_bytes():
    assert BYTES.vocab_size == 256
    assert BYTES.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert BYTES.decode([0xFF, 0x41]) == "\ufffdA"


def test_special_tokens_are_read_or_spelled_out_as_asked(bpe):
    end = bpe.eos
    assert bpe.encode("a<|endoftext|>b").count(end) == 1
    assert bpe.encode("a<|endoftext|>b", special=False).count(end) == 0
    assert bpe.decode([end, *bpe.encode("a")]) == "a"
    assert bpe.decode([end, *bpe.encode("a")], skip_special=False) == "<|endoftext|>a"
    assert bpe.stop_ids == (end,)


def test_bos_is_added_as_asked_and_refused_where_there_is_none(bpe):
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        bpe.encode("a", bos=True)
    tokenizer = Tokenizer.from_gguf(gguf_metadata(bpe))
    assert tokenizer.encode("a", bos=True) == [tokenizer.bos, *tokenizer.encode("a", bos=False)]
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)  # GPT-2 adds none by itself
    eager = Tokenizer.from_gguf(gguf_metadata(bpe, add_bos_token=True))
    assert eager.encode("a") == eager.encode("a", bos=True)


def pieces(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", [*PROSE[:4], *AWKWARD])
def test_streamed_pieces_join_to_the_text_and_break_no_character(bpe, text):
    for tokenizer in (bpe, BYTES, sentencepiece()):
        ids = tokenizer.encode(text)
        got = pieces(tokenizer, ids, skip_special=False)
        assert "".join(got) == tokenizer.decode(ids, skip_special=False)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in got)


def test_streaming_gives_each_word_when_it_is_complete():
    got = pieces(BYTES, "né🦊!".encode())
    assert [piece for piece in got if piece] == ["n", "é", "🦊", "!"]


def test_bytes_that_never_become_a_character_come_at_the_end():
    assert pieces(BYTES, [0x41, 0xE2, 0x82]) == ["A", "", "", "\ufffd"]


def test_streams_of_random_ids_equal_the_whole(bpe):
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(bpe.vocab_size) for _ in range(chance.randrange(30))]
        assert "".join(pieces(bpe, ids, skip_special=False)) == bpe.decode(ids, skip_special=False)


def test_characters_are_ids_in_order_and_others_are_refused(tmp_path):
    tokenizer = CharTokenizer("hello world")
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("hello") == [sorted(set("hello world")).index(c) for c in "hello"]
    assert tokenizer.decode(tokenizer.encode("well  hold")) == "well  hold"
    with pytest.raises(ValueError, match="outside the vocabulary of 8: 'x', 'é'"):
        tokenizer.encode("éxhello")
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("hello") == tokenizer.encode("hello")


def test_long_texts_are_not_slow():
    text = "".join(PROSE) * 700  # 250,000 characters, one word to the byte and character models
    assert CharTokenizer(text).encode(text[:200_000])[:3] == CharTokenizer(text).encode(text[:3])
    assert len(BYTES.encode(text)) == len(text.encode())


@pytest.mark.parametrize("template", [None, "{{ messages }}\n'\"é"])
def test_a_saved_folder_reads_back_alike(bpe, tmp_path, template):
    first = Tokenizer.from_gguf(
        gguf_metadata(bpe, add_bos_token=True, padding_token_id=bpe.eos) | {"tokenizer.chat_template": template}
    )
    first.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for name in ("bos", "eos", "pad", "stop_ids", "vocab_size", "chat_template", "special"):
        assert getattr(again, name) == getattr(first, name), name
    for text in [*PROSE, *AWKWARD]:
        assert again.encode(text) == first.encode(text)


def test_a_template_file_comes_before_the_configuration(bpe, tmp_path):
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).chat_template == "J"


def test_special_tokens_may_be_objects_or_in_their_own_file(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "pad_token": ""}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.bos) == (bpe.eos, None, None)


def test_a_lone_tokenizer_file_has_its_special_tokens_recognised(bpe, tmp_path):
    bpe.save(tmp_path)
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eos == bpe.eos


def test_padding_and_truncation_of_a_file_are_turned_off(bpe, tmp_path):
    copy = train_bpe(PROSE, 300)
    copy.backend.enable_padding(length=64)
    copy.backend.enable_truncation(4)
    copy.backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("the quick brown fox jumps")) > 4
    assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("a")) == 1


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "\x00\x01", '{"version": "1.0"'])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_damaged_configuration_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptFile, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_wrong_arguments_are_named(bpe):
    with pytest.raises(TypeError, match="must be a str, got bytes"):
        bpe.encode(b"x")
    with pytest.raises(ValueError, match="lone surrogates"):
        bpe.encode("a\ud800")
    with pytest.raises(ValueError, match=f"the id 400 is outside the vocabulary of {bpe.vocab_size}"):
        bpe.decode([1, 400])
    with pytest.raises(ValueError, match="the id -1"):
        bpe.decode([-1])
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(PROSE, 100)


def test_gguf_metadata_give_the_tokenizer_they_describe(bpe):
    again = Tokenizer.from_gguf(gguf_metadata(bpe))
    for text in [*PROSE, *AWKWARD]:
        assert again.encode(text) == bpe.encode(text)
        assert again.decode(again.encode(text), skip_special=False) == text


def test_smollm_cuts_every_digit_apart_also_after_spaces(bpe):
    # Its published tokenizer isolates digits first, so the spaces before one stay together; GPT-2's rule alone would
    # leave the last space to the digit.
    tokenizer = Tokenizer.from_gguf(gguf_metadata(bpe, pre="smollm"))
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str("a  12")
    assert [word for word, _ in words] == ["a", "ĠĠ", "1", "2"]


def test_llama_3_cuts_digits_by_threes_and_takes_whole_words(bpe):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(bpe, pre="llama-bpe"))
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str("it'S 1234567")
    assert [word for word, _ in words] == ["it", "'S", "Ġ", "123", "456", "7"]


def test_qwen_composes_characters(bpe):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(bpe, pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.parametrize("pre", ["", "gpt-5", None, 7])
def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones(bpe, pre):
    with pytest.raises(ValueError, match=r"unknown pre-tokenizer .*gpt-2.*cut wrongly"):
        Tokenizer.from_gguf(gguf_metadata(bpe, pre=pre))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": None}, "tokens must be a list of str"),
        ({"tokens": ["a", 3]}, "tokens must be a list of str"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice, as 0 and 2"),
        ({"merges": ["nonsense pair"]}, "merges do not fit"),
        ({"merges": ["nospace"]}, "merges do not fit"),
        ({"token_type": [1]}, "token types"),
        ({"eos_token_id": 10**6}, "eos token id 1000000 is outside"),
        ({"bos_token_id": -1}, "bos token id -1 is outside"),
    ],
)
def test_contradictory_metadata_are_refused(bpe, changes, problem):
    with pytest.raises(CorruptFile, match=problem):
        Tokenizer.from_gguf(gguf_metadata(bpe, **changes))


@pytest.mark.parametrize("kind", ["bert", "t5", None])
def test_an_unknown_kind_of_vocabulary_says_which_are_known(bpe, kind):
    with pytest.raises(ValueError, match="known are 'gpt2'"):
        Tokenizer.from_gguf(gguf_metadata(bpe, model=kind))


# --- SentencePiece -------------------------------------------------------------------------------------------------


def sentencepiece_metadata(add_space_prefix=True):
    """A small vocabulary with scores: specials, bytes, characters, and pieces whose scores fight each other."""
    letters = "▁abcdehlnortw"
    joined = ["▁h", "he", "ll", "lo", "▁he", "llo", "hel", "▁hello", "or", "▁w", "▁wor", "ld", "rld", "▁world", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *joined]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (len(letters) + len(joined)))]
    scores = [0.0] * (3 + 256) + [-100.0 - i for i in range(len(letters))]
    chance = random.Random(3)
    scores += [-float(rank) for rank in chance.sample(range(len(joined)), len(joined))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def sentencepiece(add_space_prefix=True):
    return Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix))


def joined_greedily(metadata, text):
    """SentencePiece's rule, plainly: join the two neighbours whose joined piece scores best, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    known = {token: index for index, token in enumerate(tokens) if kinds[index] == 1}
    symbols = list(("▁" + text if text else "").replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[known[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in known
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    ids = []
    for symbol in symbols:
        spelled = [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
        ids += [known[symbol]] if symbol in known else spelled
    return ids


def test_sentencepiece_joins_by_score():
    metadata = sentencepiece_metadata()
    tokenizer = Tokenizer.from_gguf(metadata)
    chance = random.Random(0)
    for text in ["hello world", "  hello", "wor ld", "é🦊 hello", *AWKWARD[:6]]:
        assert tokenizer.encode(text, bos=False) == joined_greedily(metadata, text), text
    for _ in range(300):
        text = "".join(chance.choice("  abcdehlnortw") for _ in range(chance.randrange(1, 25)))
        assert tokenizer.encode(text, bos=False) == joined_greedily(metadata, text), text


def test_sentencepiece_begins_with_bos_and_survives_the_round_trip():
    for prefix in (True, False):
        tokenizer = sentencepiece(prefix)
        for text in ["hello world", "  two spaces ", "naïve 🦊", " "]:
            ids = tokenizer.encode(text)
            assert ids[0] == tokenizer.bos == 1
            assert tokenizer.decode(ids) == text
    assert sentencepiece(True).encode("hello") != sentencepiece(False).encode("hello")


def test_sentencepiece_needs_a_score_for_every_token():
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"][:-1]
    with pytest.raises(CorruptFile, match="scores"):
        Tokenizer.from_gguf(metadata)
