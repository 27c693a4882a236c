"""Shared fixtures: offline environment before anything of Hugging Face is imported, and the optional real data."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores

import pytest  # noqa: E402

pytest_plugins = ["networks"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and third-party checkpoints; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("D3_HF_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder.name}/; set D3_HF_SHARED to its folder")
    return folder
