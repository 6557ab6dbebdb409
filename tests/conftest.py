"""Every test runs on one thread (the runner spreads them over the cores) and from a fixed seed."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct; the tests that take it are skipped where the file cannot be had."""
    import paperworks as pw
    from paperworks.core.errors import AssetUnavailable

    try:
        return pw.load("smollm2")
    except AssetUnavailable as error:
        pytest.skip(str(error))
