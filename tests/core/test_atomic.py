import pytest

from paperworks.core.atomic import writing_directory, writing_file


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


def test_folders_appear_whole_or_not_at_all(tmp_path):
    with writing_directory(tmp_path / "m") as out:
        (out / "first").write_text("first")
        assert not (tmp_path / "m").exists()
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["first"]

    def fail():
        with writing_directory(tmp_path / "n") as out:
            (out / "second").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_folders_with_content_are_never_touched(tmp_path):
    kept = tmp_path / "thesis"
    kept.mkdir()
    (kept / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds chapter\.tex already"), writing_directory(kept) as out:
        (out / "weights").touch()
    assert (kept / "chapter.tex").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis"]


def test_files_that_arrive_during_the_write_are_kept(tmp_path):
    def race():
        with writing_directory(tmp_path / "m") as out:
            (out / "ours").touch()
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "theirs").touch()

    with pytest.raises(FileExistsError, match="holds theirs"):
        race()
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["theirs"]


def test_an_empty_folder_and_one_behind_a_link_are_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with writing_directory(tmp_path / "link") as out:
        (out / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "m").write_text("a file")
    with pytest.raises(FileExistsError, match="a file stands"), writing_directory(tmp_path / "m"):
        pass
    assert (tmp_path / "m").read_text() == "a file"


def test_permissions_are_those_of_ordinary_files(tmp_path):
    with writing_file(tmp_path / "a") as out:
        out.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
