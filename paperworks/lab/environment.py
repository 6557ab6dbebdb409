"""Where a result was measured: versions, processor and threads, nothing that names a person or a machine."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from paperworks.lab.values import Value


def describe_environment(device: str) -> dict[str, Value]:
    """Record of software and hardware that goes with every result; imports torch."""
    import torch

    record: dict[str, Value] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "paperworks": _version("paperworks"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        record["accelerator"] = torch.cuda.get_device_name(device)
    return record


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes as long as all else that `list` imports

    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder that was never installed
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
