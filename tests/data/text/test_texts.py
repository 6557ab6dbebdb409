"""Data sets by name: found where they lie, verified, their origin told; missing ones say how to provide them."""

import dataclasses
import gzip
import hashlib
import json
import logging

import pytest

from paperworks.core.errors import AssetUnavailable, CorruptFile
from paperworks.data.text import sources as text_sources
from paperworks.data.text import texts as text


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A data folder and an empty cache of this test's own."""
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAPERWORKS_DATA", f"{tmp_path / 'absent'}:{tmp_path / 'data'}")
    monkeypatch.delenv("PAPERWORKS_OFFLINE", raising=False)
    return tmp_path


def publish(monkeypatch, shelf, name, content, file=None, folder="data"):
    """Give a data set this content, and put its file in the folder."""
    source = text_sources.SOURCES[name]
    source = dataclasses.replace(source, sha256=hashlib.sha256(content).hexdigest(), file=file or source.file)
    monkeypatch.setitem(text_sources.SOURCES, name, source)
    if folder:
        path = shelf / folder / source.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return source


def test_a_text_is_found_in_the_data_folders_and_says_so(shelf, monkeypatch, caplog):
    source = publish(monkeypatch, shelf, "names", "ana\nbo\né".encode())
    with caplog.at_level(logging.INFO):
        found = text.load_text("names")
    assert found.text == "ana\nbo\né"
    assert found.origin == str(shelf / "data" / source.file)
    assert found.origin in caplog.text


def test_the_cache_comes_first(shelf, monkeypatch):
    source = publish(monkeypatch, shelf, "names", b"ana")
    publish(monkeypatch, shelf, "names", b"ana", folder="cache/data")
    assert text.load_text("names").origin == str(shelf / "cache" / "data" / source.file)


def test_records_come_from_json_lines_json_and_csv(shelf, monkeypatch):
    rows = [{"question": "1+1?\u2028", "answer": "2"}, {"question": "é", "answer": ""}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    publish(monkeypatch, shelf, "gsm8k-test", lines)
    assert text.load_records("gsm8k-test").rows == rows
    publish(monkeypatch, shelf, "hh-harmless-test", gzip.compress(lines, mtime=0))
    assert text.load_records("hh-harmless-test").rows == rows
    publish(monkeypatch, shelf, "emotions/anger", b'["a", "b"]')
    assert text.load_records("emotions/anger").rows == ["a", "b"]
    publish(monkeypatch, shelf, "truth/cities", b'statement,label\n"One, two",1\n')
    assert text.load_records("truth/cities").rows == [{"statement": "One, two", "label": "1"}]


def test_a_changed_file_is_refused(shelf, monkeypatch):
    source = publish(monkeypatch, shelf, "names", b"ana")
    (shelf / "data" / source.file).write_bytes(b"eve")
    with pytest.raises(CorruptFile, match="is not the published data set 'names'"):
        text.load_text("names")


def test_a_missing_file_is_not_downloaded_unasked_and_the_error_says_what_to_do(shelf, monkeypatch):
    monkeypatch.setattr(text.urllib.request, "urlopen", lambda *_, **__: pytest.fail("nobody asked"))
    with pytest.raises(AssetUnavailable) as caught:
        text.load_text("tinyshakespeare")
    message = str(caught.value)
    for part in (
        "karpathy/char-rnn",
        "86c4e6aa9db7",
        str(shelf / "cache"),
        "text/tinyshakespeare.txt",
        "download=True",
    ):
        assert part in message
    assert message.count(". ") == 0  # one sentence


def test_offline_forbids_even_what_was_asked_for(shelf, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_OFFLINE", "1")
    monkeypatch.setattr(text.urllib.request, "urlopen", lambda *_, **__: pytest.fail("offline"))
    with pytest.raises(AssetUnavailable, match="PAPERWORKS_OFFLINE"):
        text.load_text("names", download=True)


def test_a_download_is_verified_then_kept(shelf, monkeypatch):
    source = publish(monkeypatch, shelf, "names", b"ana", folder=None)
    asked = []

    class Answer:
        def __init__(self, content):
            self.content = content

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def read(self, most):
            return self.content[:most]

    def serve(content):
        monkeypatch.setattr(text.urllib.request, "urlopen", lambda url, **_: asked.append(url) or Answer(content))

    serve(b"an error page")
    with pytest.raises(CorruptFile, match="names"):
        text.load_text("names", download=True)
    assert not (shelf / "cache").exists()  # a bad download never poisons the cache
    serve(b"ana")
    assert text.load_text("names", download=True).origin == source.published
    assert text.load_text("names").origin == str(shelf / "cache" / "data" / source.file)
    assert len(asked) == 2
    assert "karpathy/makemore" in asked[0]


def test_a_failing_network_says_how_to_provide_the_file(shelf, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(text.urllib.request, "urlopen", fail)
    with pytest.raises(AssetUnavailable, match=r"no route.*put the file of GitHub karpathy/makemore: names\.txt"):
        text.load_text("names", download=True)


def test_python_docs_need_no_file(shelf):
    docs = text.load_text("python-docs")
    assert docs.origin.startswith("pydoc_data.topics of Python 3.")
    assert len(docs.text) > 300_000
    assert "statement" in docs.text


def test_split_is_by_position_and_loses_nothing():
    train, validation = text.split("abcdefghij", 0.3)
    assert (train, validation) == ("abcdefg", "hij")
    with pytest.raises(ValueError, match="between 0 and 1"):
        text.split("abc", 1.5)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tinyshakespeare'"):
        text.load_text("tiny-shakespeare")
    assert "python-docs" in text.names()


@pytest.mark.asset
def test_the_real_files_are_the_published_ones():
    found = 0
    for name, source in text_sources.SOURCES.items():
        try:
            rows = text.load_records(name).rows
        except AssetUnavailable:
            continue
        found += 1
        assert len(rows) > 40, source.file
    if not found:
        pytest.skip("no folder of PAPERWORKS_DATA holds any of the data sets")
