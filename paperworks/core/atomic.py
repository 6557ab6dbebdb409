"""Files and folders that appear whole or not at all, and never at the cost of what stands there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(descriptor)
    temporary = Path(name)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; the result should be an ordinary file
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are synced and it is renamed to `path`.

    Nothing that exists is replaced or removed: `path` must be new, or an empty folder. A link is followed, so the files
    arrive where it points.

    Raises:
        FileExistsError: when `path` is a file, or a folder that holds anything.
    """
    target = Path(path).resolve()
    _require_vacant(target, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        _require_vacant(target, path)  # rename itself refuses a folder with content, but says less
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_vacant(target: Path, named: str | Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file stands where a folder is to be written; choose another", str(named))
    inside = sorted(entry.name for entry in target.iterdir())
    if inside:
        listing = ", ".join(inside[:3]) + (f", ... ({len(inside)} entries)" if len(inside) > 3 else "")
        raise FileExistsError(
            errno.EEXIST,
            f"the folder holds {listing} already, and nothing in it is overwritten; choose a new folder, or remove "
            "this one first",
            str(named),
        )
