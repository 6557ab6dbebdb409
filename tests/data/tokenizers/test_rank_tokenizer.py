"""The rank tokenizer against tiktoken, against SmolLM2's own tokenizer, and its merges against the slow ones."""

import base64
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.core.errors import CorruptFile
from paperworks.data.tokenizers.byte_pairs import merge, merge_by_heap, merge_by_search
from paperworks.data.tokenizers.rank_tokenizer import PATTERNS, RankTokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}
SPECIAL = {"<|endoftext|>": 1000, "<|endofprompt|>": 1001, "<|fim|>": 1002}
SAMPLE = (
    "  Hello, world! It's 12345 o'clock;\tI'LL be  there \n\n soon…  ÉCOLE été 東京タワー 👩‍👩‍👧 \r\n x²½ Ⅻ ٣ ǅ  end   "
)


def trained(merges=300, seed=0):
    """Ranks of merges that are plausible: each joins two tokens of a text."""
    draws = random.Random(seed)
    ranks, text = dict(BYTES), (SAMPLE * 3 + " the thing that there then this hello world").encode()
    while len(ranks) < 256 + merges:
        start, size = draws.randrange(len(text)), draws.choice((2, 2, 3, 4))
        parts = merge_by_search(text[start : start + 12], ranks)
        joined = b"".join(parts[:2])
        if len(parts) > 1 and size <= len(joined) * 4 and joined not in ranks:
            ranks[joined] = len(ranks)
    return ranks


RANKS = trained()


def both(pattern, ranks=RANKS):
    import tiktoken

    peer = tiktoken.Encoding("peer", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=SPECIAL)
    return RankTokenizer(ranks, pattern=pattern, special_tokens=SPECIAL), peer


# what patterns tell apart: case, marks, digits of all kinds, spaces of all kinds, joined emoji, long s, dotted I
HARD = st.text(
    st.one_of(
        st.sampled_from("aZ sSſKtTlLİıéÉß'’\n\r\t \u00a0\u2003\u3000\u200b\u0085\u2028\x0b\x0c\x1c\x1f٣²½"
            "Ⅻ0123.,!_-東京👩\u200d\u0301ǅ"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_ids_equal_tiktokens_on_text_made_to_be_hard(pattern):
    ours, peer = both(pattern)

    @given(HARD)
    @settings(max_examples=400, deadline=None, derandomize=True)
    def check(text):
        ids = ours.encode_ordinary(text)
        assert ids == peer.encode_ordinary(text)
        assert "".join(ours.pieces(text)) == text
        assert ours.decode(ids) == text == peer.decode(ids)

    check()
    assert ours.encode(SAMPLE) == peer.encode(SAMPLE)
    assert ours.vocab_size == peer.n_vocab


@pytest.mark.parity
def test_special_tokens_are_read_refused_and_spelled_as_by_tiktoken():
    ours, peer = both("cl100k")
    text = "a<|endoftext|>b <|endofprompt|><|fim|> c"
    assert ours.encode(text, allowed="all") == peer.encode(text, allowed_special="all")
    assert ours.encode(text, special=False) == peer.encode(text, disallowed_special=())
    plain = "a<|endofprompt|>"
    assert ours.encode(plain, allowed={"<|endofprompt|>"}) == peer.encode(plain, allowed_special={"<|endofprompt|>"},
                                                                          disallowed_special=())  # fmt: skip
    for tokenizer in (ours, peer):
        with pytest.raises(ValueError, match="special token"):
            tokenizer.encode("stranger's <|endoftext|>")
    ids = ours.encode(text, allowed="all")
    assert ours.decode(ids, skip_special=False) == peer.decode(ids) == text
    assert ours.decode(ids) == "ab  c"


@pytest.mark.asset
def test_smollm2s_own_merges_as_ranks_give_its_ids(smollm2):
    own = smollm2.tokenizer
    import json

    model = json.loads(own.backend.to_str())["model"]
    symbol = _bytes_of_symbols()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in model["merges"]:
        first, second = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault(bytes(symbol[c] for c in first + second), len(ranks))
    ours = RankTokenizer(ranks, pattern="gpt2")
    ids = {
        bytes(symbol[c] for c in token): index for token, index in model["vocab"].items() if set(token) <= set(symbol)
    }
    for text in ("The quick brown fox, isn't it?  Yes\n\n", "naïve café — 東京", "def f(x):\n    return x+x\n"):
        there = own.encode(text, bos=False, special=False)
        tokens = [ours.decode_bytes([token]) for token in ours.encode_ordinary(text)]
        assert [ids[token] for token in tokens] == there


def _bytes_of_symbols():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


@given(st.lists(st.sampled_from(list(b" theworldnr\xe6\x9d")), max_size=300).map(bytes), st.integers(0, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_heap_merges_as_the_search_does(piece, seed):
    ranks = trained(60, seed)  # of these letters most pairs have one
    assert merge_by_heap(piece, ranks) == merge_by_search(piece, ranks) == merge(piece, ranks)
    assert b"".join(merge(piece, ranks)) == piece


def test_equal_pairs_are_joined_from_the_left():
    ranks = BYTES | {b"aa": 256, b"aaa": 257, b"aaaa": 258}
    for function in (merge_by_heap, merge_by_search):
        assert function(b"aaa", ranks) == [b"aaa"]
        assert function(b"a" * 7, ranks) == [b"aaaa", b"aaa"]
        assert function(b"", ranks) == []


def test_a_piece_that_is_a_token_is_its_rank_whatever_the_merges_would_do():
    ranks = BYTES | {b"bc": 256, b"abcd": 257}  # no merge leads to abcd
    assert RankTokenizer(ranks).encode("abcd") == [257]
    assert merge(b"abcd", ranks) == [b"a", b"bc", b"d"]


def test_half_a_character_decodes_to_a_replacement_and_streams_when_whole():
    tokenizer = RankTokenizer(BYTES)
    ids = tokenizer.encode("é")
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:1]) == "é".encode()[:1]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "é"]


def test_a_rank_file_round_trips_and_is_what_tiktoken_reads(tmp_path):
    tokenizer = RankTokenizer(RANKS, pattern="cl100k")
    tokenizer.save(tmp_path / "our.tiktoken")
    again = RankTokenizer.from_file(tmp_path / "our.tiktoken", pattern="cl100k")
    assert again.ranks == RANKS
    from tiktoken.load import load_tiktoken_bpe

    assert load_tiktoken_bpe(str(tmp_path / "our.tiktoken")) == RANKS


def lines(ranks):
    return [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ok: [b"!!!! 256", *ok], "line 1: .* is not base64"),
        (lambda ok: [*ok, b"YWI="], "line 257: not base64, a space and a rank"),
        (lambda ok: [*ok, b"YWI= -3"], "line 257: not base64, a space and a rank"),
        (lambda ok: [*ok, b"YWI= 9" + b"9" * 5000], "too large"),
        (lambda ok: [*ok, ok[7]], r"line 257: the token b'\\x07' has the rank 7 already"),
        (lambda ok: [*ok, b"YWI= 7"], "the rank 7 .* also"),
        (lambda ok: ok[1:], "1 of the 256 single bytes"),
        (lambda ok: [*ok, b"YWI= 258"], "the rank 256 belongs to no token"),
        (lambda ok: [*ok, b" 256"], "empty token"),
        (lambda ok: [b"\x80\x04c__import__('os')"], "line 1: not base64"),
        (lambda ok: [], "256 of the 256"),
    ],
)
def test_a_hostile_rank_file_is_refused_and_says_where(tmp_path, damage, message):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(damage(lines(BYTES))))
    with pytest.raises(CorruptFile, match=message):
        RankTokenizer.from_file(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankTokenizer(BYTES, pattern="(["), "no regular expression"),
        (lambda: RankTokenizer(BYTES, special_tokens={"<s>": 3}), "not free"),
        (lambda: RankTokenizer(BYTES, special_tokens={"": 300}), "needs a text"),
        (lambda: RankTokenizer(BYTES).encode("a", bos=True), "no beginning-of-sequence"),
        (lambda: RankTokenizer(BYTES).encode("\ud800"), "lone surrogates"),
        (lambda: RankTokenizer(BYTES).decode([999]), "outside the vocabulary"),
        (lambda: RankTokenizer(BYTES, special_tokens={"<s>": 300}).encode("a", allowed={"<t>"}), "no special token"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_special_token_may_stand_between_ranks_and_no_file_is_named():
    assert RankTokenizer(BYTES | {b"ab": 257}, special_tokens={"<|endoftext|>": 256}).eos == 256
    with pytest.raises(FileNotFoundError, match="no rank file"):
        RankTokenizer.from_file("nowhere.tiktoken")
    with pytest.raises(TypeError, match="must be a str"):
        RankTokenizer(BYTES).encode(b"bytes")
