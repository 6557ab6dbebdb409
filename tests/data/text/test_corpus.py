"""Documents from files, and the tokenizers that fit them."""

import json

import pytest
import torch

from paperworks.data.text.corpus import Corpus, Separated, document_segments, fitting_tokenizer, read_corpus
from paperworks.data.text.windows import RandomWindows


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("Zoë said:\nyes")
    corpus = read_corpus(str(tmp_path / "a.txt"))
    assert corpus.documents == ["Zoë said:\nyes"]
    assert corpus.characters == 13


def test_records_are_documents(tmp_path):
    rows = [{"text": "one", "more": 1}, {"text": "two\u2028lines"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_corpus(str(tmp_path / "a.jsonl")).documents == ["one", "two\u2028lines"]
    with pytest.raises(ValueError, match=r"line 1: no text under 'body'; it has: text, more"):
        read_corpus(str(tmp_path / "a.jsonl"), column="body")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_corpus(str(tmp_path / "b.jsonl"))


def test_what_is_no_text_is_refused(tmp_path):
    for name, content, message in (
        ("empty.txt", b"  \n", "holds no text"),
        ("binary.txt", b"\x89PNG\xff", r"not a text in UTF-8 \(byte 0\)"),
        ("nul.txt", b"a\0b", "it is a binary file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_corpus(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"no file at .*known: .*tinyshakespeare"):
        read_corpus("tinyshakespear")


def test_the_end_is_held_out():
    one = Corpus(["abcdefghij"], "")
    assert [part.documents for part in one.cut(0.2)] == [["abcdefgh"], ["ij"]]
    many = Corpus(list("abcde"), "")
    assert [part.documents for part in many.cut(0.4)] == [["a", "b", "c"], ["d", "e"]]
    assert [part.documents for part in many.cut(0.01)] == [["a", "b", "c", "d"], ["e"]]  # never nothing
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        one.cut(1)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_tokenizers_spell_what_they_were_made_for(kind, tmp_path):
    corpus = Corpus(["the cat sat on the mat. " * 20, "Zoë, the cat, " * 5], "")
    tokenizer = fitting_tokenizer(kind, corpus, vocab_size=300)
    ids = corpus.encode(tokenizer).tolist()
    assert tokenizer.decode(ids).startswith(corpus.documents[0])
    assert (ids[-1] == tokenizer.eos) == (kind == "bpe")
    tokenizer.save(tmp_path)
    again = fitting_tokenizer(str(tmp_path), corpus)
    assert again.encode(corpus.documents[1]) == tokenizer.encode(corpus.documents[1])


def test_a_special_token_written_in_a_document_is_text():
    corpus = Corpus(["the end <|endoftext|> is near " * 8, "no"], "")
    tokenizer = fitting_tokenizer("bpe", corpus, vocab_size=300)
    assert corpus.encode(tokenizer).tolist().count(tokenizer.eos) == 2


def test_an_unknown_tokenizer_says_which_there_are():
    with pytest.raises(ValueError, match="unknown tokenizer 'words': bytes, chars, bpe"):
        fitting_tokenizer("words", Corpus(["a"], ""))


def test_packed_documents_are_told_apart():
    tokens = torch.tensor([[5, 6, 0, 7, 0, 8]])
    assert document_segments(tokens, 0).tolist() == [[1, 1, 1, 2, 2, 3]]
    windows = RandomWindows(torch.tensor([5, 6, 0, 7, 0, 8, 9]), length=4, batch=2, count=3)
    separated = Separated(windows, 0)
    separated.set_epoch(1)
    assert windows.epoch == 1
    assert len(separated) == 3
    for batch in separated:
        assert torch.equal(batch["segments"], document_segments(batch["tokens"], 0))
