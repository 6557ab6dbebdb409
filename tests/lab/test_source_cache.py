from paperworks.lab import fingerprint, source_cache
from paperworks.lab.fingerprint import Source


def test_what_was_parsed_is_known_the_next_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path))
    monkeypatch.setattr(fingerprint, "_known", {})
    assert source_cache.load() == 0
    fingerprint.learn({"a": Source(text="t", code="c", uses=("paperworks.testbeds.digits",))})
    source_cache.save(0)
    monkeypatch.setattr(fingerprint, "_known", {})
    assert source_cache.load() == 1
    assert fingerprint.known() == {"t": Source(text="t", code="c", uses=("paperworks.testbeds.digits",))}


def test_a_damaged_cache_or_one_of_another_method_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path))
    monkeypatch.setattr(fingerprint, "_known", {})
    for content in ("", "[]", '{"method": 1}', '{"method": "other", "sources": {"t": ["c", []]}}', '{"sources": 3}'):
        source_cache.path().write_text(content)
        assert source_cache.load() == 0
    assert fingerprint.known() == {}


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(fingerprint, "_known", {"t": Source(text="t", code="c")})
    source_cache.save(0)
