import pytest

from paperworks.atomic import recover_directory, writing_directory, writing_file


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with writing_file(path) as out:
        out.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def fail():
        with writing_file(path) as out:
            out.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_folders_replace_older_ones_as_a_whole(tmp_path):
    for content in ("first", "second"):
        with writing_directory(tmp_path / "m") as out:
            (out / content).write_text(content)
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["second"]

    def fail():
        with writing_directory(tmp_path / "m") as out:
            (out / "third").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_kill_between_the_renames_is_mended(tmp_path):
    (tmp_path / ".m.previous").mkdir()
    (tmp_path / ".m.previous" / "old").touch()
    recover_directory(tmp_path / "m")
    assert (tmp_path / "m" / "old").exists()
    (tmp_path / ".m.previous").mkdir()
    recover_directory(tmp_path / "m")  # a kill after the second rename: the new folder stays, the older one goes
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_permissions_are_those_of_ordinary_files(tmp_path):
    with writing_file(tmp_path / "a") as out:
        out.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
