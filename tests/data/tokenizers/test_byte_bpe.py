"""The trainer against counting everything again, and against the tokenizers library; decoding against brute force."""

import random
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.data.tokenizers.byte_bpe import BYTE_ORDER, train_ranks
from paperworks.data.tokenizers.byte_decoding import most_characters
from paperworks.data.tokenizers.rank_tokenizer import RankTokenizer


def pieces(seed=0, count=400):
    draws = random.Random(seed)
    stems = ["the", "there", "other", "mother", "aaaa", "été", "東京", "東風", "👩👧", "low", "lower", "newest"]
    return [(draws.choice(["", " "]) + draws.choice(stems) * draws.choice([1, 1, 2])).encode() for _ in range(count)]


def recounted(some, vocab_size, min_frequency):
    """The same, every pair counted anew before every merge."""
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    words = [([piece[at : at + 1] for at in range(len(piece))], count) for piece, count in Counter(some).items()]
    while len(ranks) < vocab_size:
        totals = Counter()
        for word, count in words:
            for at in range(len(word) - 1):
                totals[word[at], word[at + 1]] += count
        if not totals or max(totals.values()) < min_frequency:
            break
        first, second = min(totals, key=lambda pair: (-totals[pair], ranks[pair[0]], ranks[pair[1]]))
        ranks.setdefault(first + second, len(ranks))
        for word, _ in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == (first, second):
                    word[at : at + 2] = [first + second]
                at += 1
    return ranks


@pytest.mark.parametrize("min_frequency", [1, 2, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_incremental_counts_learn_what_counting_again_learns(seed, min_frequency):
    some = pieces(seed)
    assert train_ranks(some, 340, min_frequency=min_frequency) == recounted(some, 340, min_frequency)


@given(st.lists(st.binary(max_size=8).map(lambda b: bytes(x % 3 for x in b)), max_size=12))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_also_where_pairs_overlap_and_tokens_are_spelled_twice(some):
    assert train_ranks(some, 290, min_frequency=1) == recounted(some, 290, 1)


def peers_ranks(texts, vocab_size):
    import json

    from paperworks.data.tokenizers.tokenizer import train_bpe

    backend = train_bpe(texts, vocab_size, special_tokens=()).backend
    return json.loads(backend.to_str())["model"]


def in_symbols(token):
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in token)


@pytest.mark.parity
def test_vocabulary_and_ids_equal_the_tokenizers_librarys_ties_included():
    text = " ".join(piece.decode().strip() for piece in pieces(3, 3_000)) + " it's 1234, isn't it?\n\n  twice  "
    cutter = RankTokenizer({bytes([byte]): byte for byte in range(256)}, pattern="gpt2")
    ranks = train_ranks((piece.encode() for piece in cutter.pieces(text)), 330)
    assert {in_symbols(token): rank for token, rank in ranks.items()} == peers_ranks([text], 330)["vocab"]


def test_any_bytes_round_trip_and_more_merges_never_need_more_tokens():
    some = pieces(5)
    ladder = [RankTokenizer(train_ranks(some, size)) for size in (256, 270, 300, 340)]
    draws = random.Random(0)
    for piece in [*set(some), *(draws.randbytes(30) for _ in range(50))]:
        lengths = []
        for tokenizer in ladder:
            ids = tokenizer._merged(piece)
            assert tokenizer.decode_bytes(ids) == piece
            lengths.append(len(ids))
        assert lengths == sorted(lengths, reverse=True)


def test_merges_stay_inside_pieces_and_end_when_nothing_is_frequent():
    ranks = train_ranks([b"ab", b"ab", b"cd"], 300)
    assert list(ranks)[256:] == [b"ab"]
    with pytest.raises(ValueError, match="at least 256"):
        train_ranks([], 255)
    with pytest.raises(ValueError, match="at least 1"):
        train_ranks([], 300, min_frequency=0)


# --- decoding


def brute_force(written):
    """The most characters of any choice of bytes to keep that decodes, contiguous within each character."""
    if not written:
        return 0
    best = 0
    for cuts in range(len(written)):
        for places in combinations(range(1, len(written)), cuts):
            bounds = [0, *places, len(written)]
            parts = [written[a:b] for a, b in pairwise(bounds)]
            best = max(best, sum(_character(part) for part in parts))
    return best


def _character(part):
    try:
        return len(part.decode()) == 1
    except UnicodeDecodeError:
        return False


@given(st.lists(st.sampled_from(list(b"a\xc3\xa9\xe6\x9d\xb1\xf0\x9f\x91\xa9\x80\xff")), max_size=10).map(bytes))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_other_reading_of_short_bytes_has_more_characters(written):
    text = most_characters(written)
    assert len(text) == brute_force(written)
    position = 0
    for character in text:  # and it stands there, in order
        position = written.index(character.encode(), position) + len(character.encode())


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_valid_text_is_returned_as_it_is(text):
    assert most_characters(text.encode("utf-8", "ignore")) == text


def test_what_is_lost_is_the_broken_character_only():
    written = "naïve 東京".encode()
    assert most_characters(written[:3] + written[4:]) == "nave 東京"
    assert most_characters(b"\xff\xfe") == ""
