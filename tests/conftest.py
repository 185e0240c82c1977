"""Shared by all tests: repeatable hypothesis, and where the real data is."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("repeatable")

_CAMVID = Path(os.environ.get("BISENET_CAMVID", Path(__file__).parents[2] / "shared" / "data" / "camvid_tiny"))


@pytest.fixture(scope="session")
def camvid() -> Path:
    """A CamVid in list form (see the README); its folder is named by the environment variable BISENET_CAMVID."""
    if not (_CAMVID / "train.txt").is_file():
        pytest.skip(f"no CamVid at {_CAMVID}; set BISENET_CAMVID")
    return _CAMVID


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny synthetic set; written by the first run that uses it."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    return [f"data.root={root}", "data.synthetic={train: 6, val: 3, test: 2, size: [64, 128]}"]
