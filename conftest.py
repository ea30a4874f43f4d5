"""What every test, and every example of the docstrings and the README, runs under."""

from __future__ import annotations

import os

# Read by huggingface_hub when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in a crowd."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def examples_write_elsewhere(request: pytest.FixtureRequest) -> None:
    """Examples write run.zarr and maps.html where they stand, so they stand in a folder of their own."""
    if isinstance(request.node, pytest.DoctestItem):
        path = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(path)
