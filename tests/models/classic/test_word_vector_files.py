"""Word vectors as text: read back bit for bit, exchanged with gensim, and refused when broken."""

import pytest
import torch

from paperworks.models.classic.word_vector_files import read_word_vectors, write_word_vectors

WORDS = ("the", "König", "北京", "new_york", "no\u00a0break", "</s>")


def table(rows=6, dim=5):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, dim - 3)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    vectors = table()
    vectors[0, 0], vectors[1, 1] = 1e-42, -3.4028234e38  # a subnormal number, and the largest
    write_word_vectors(tmp_path / "v.txt", WORDS, vectors)
    words, back = read_word_vectors(tmp_path / "v.txt")
    assert words == WORDS
    assert torch.equal(back, vectors)


def test_a_line_is_the_word_and_its_numbers(tmp_path):
    write_word_vectors(tmp_path / "v.txt", ["a", "b"], torch.tensor([[1.0, -0.5], [0.1, 4e9]]))
    assert (tmp_path / "v.txt").read_text() == "2 2\na 1 -0.5\nb 0.100000001 4e+09\n"


@pytest.mark.parametrize("text", ["2 2\na 1 2\nb 3 4", "2 2 \na 1 2 \nb 3 4 \n", "2 2\r\na 1 2\r\nb 3 4\r\n"])
def test_the_published_programs_trailing_spaces_and_other_line_ends_are_read(tmp_path, text):
    (tmp_path / "v.txt").write_bytes(text.encode())
    words, vectors = read_word_vectors(tmp_path / "v.txt")
    assert words == ("a", "b")
    assert vectors.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parity
def test_gensim_reads_ours_and_we_read_gensims(tmp_path):
    gensim = pytest.importorskip("gensim")
    vectors = table()
    write_word_vectors(tmp_path / "ours.txt", WORDS, vectors)
    theirs = gensim.models.KeyedVectors.load_word2vec_format(tmp_path / "ours.txt", binary=False)
    assert tuple(theirs.index_to_key) == WORDS
    assert torch.equal(torch.from_numpy(theirs.vectors.copy()), vectors)
    theirs.save_word2vec_format(tmp_path / "theirs.txt", binary=False)
    words, back = read_word_vectors(tmp_path / "theirs.txt")
    assert words == WORDS
    torch.testing.assert_close(back, vectors, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1"),
        (b"a 1 2\nb 3 4\n", "line 1: expected the numbers of words"),
        (b"2\na 1 2\n", "line 1"),
        (b"-2 2\na 1 2\n", "line 1"),
        (b"0 2\n", "no word vectors"),
        (b"2 0\na\nb\n", "no word vectors"),
        (b"9" * 5000 + b" 2\n", "line 1"),
        (b"999999999999 999999\na 1 2\n", "line 2: 'a' has 2 numbers, expected 999999"),
        (b"999999999999 2\na 1 2\n", "ends after 1 of 999999999999 words"),
        (b"2 2\na 1 2\n", "truncated"),
        (b"2 2\na 1 2\nb 3\n", "line 3: 'b' has 1 numbers"),
        (b"2 2\na 1 2\nb 3 4 5\n", "line 3: 'b' has 3 numbers"),
        (b"1 2\na 1 2\nb 3 4\n", "more than the 1 words"),
        (b"2 2\na 1 2\nb 3 x\n", "line 3: the vector of 'b' has what is no number"),
        (b"2 2\na 1 2\nb 3 nan\n", "line 3: the vector of 'b' has numbers that are not finite"),
        (b"2 2\na 1 2\nb 3 1e999\n", "line 3"),
        (b"2 2\na 1 2\nb 3 1e300\n", "line 3"),
        (b"2 2\na 1 2\na 3 4\n", "'a' is there 2 times"),
        (b"2 2\na 1 2\n 3 4\n", "line 3: there is no word"),
        (b"2 2\na 1 2\n\n", "line 3: there is no word"),
        (b"2 2\na 1 2\n\xff 3 4\n", "line 3: not UTF-8"),
    ],
)
def test_what_is_truncated_or_hostile_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_word_vectors(tmp_path / "v.txt")


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["a"], torch.zeros(2, 3), "1 words need"),
        ([], torch.zeros(0, 3), "at least one"),
        (["a b", "c"], torch.zeros(2, 3), "underscore"),
        (["a", ""], torch.zeros(2, 3), "not empty"),
        (["a", "c\n"], torch.zeros(2, 3), "line break"),
        (["a", "a"], torch.zeros(2, 3), "2 times"),
        (["a", "b"], torch.tensor([[1.0], [torch.inf]]), "'b' has numbers that are not finite"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, words, vectors, message):
    with pytest.raises(ValueError, match=message):
        write_word_vectors(tmp_path / "v.txt", words, vectors)
    assert not (tmp_path / "v.txt").exists()
