"""What the package computes is what its first version computed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


def recorded(names: list[str], folder: Path) -> dict[str, Any]:
    """Train in one process whose instruction set is that of the record."""
    program = [sys.executable, golden.__file__, str(folder), *names]
    environment = os.environ | golden.ENVIRONMENT | {"PYTHONPATH": str(DATA.parents[1])}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("\n{\n") :])


def flat(node: Any, path: str = "") -> dict[str, Any]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {path: node}
    return {name: value for key, item in items for name, value in flat(item, f"{path}/{key}").items()}


@pytest.mark.parametrize(
    "names",
    [["bisenetv2/current"], pytest.param(golden.RUNS, marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_runs_repeat_the_record(names: list[str], tmp_path: Path) -> None:
    """To the last digit, where the processor computes as that of the record; else the first step nearly."""
    records = json.loads((DATA / "golden.json").read_text())
    expected = records.get(golden.maker(), records["GenuineIntel"])
    found = recorded(names, tmp_path)
    same_processor = golden.maker() in records and found.pop("canary") == expected["canary"]
    for name in names:
        ours, record = flat(found[name]), flat(expected[name])
        assert ours.keys() == record.keys()
        rates = [key for key in record if "/lr/" in key]  # Lightning's monitor logs them in double precision
        np.testing.assert_allclose([ours[key] for key in rates], [record[key] for key in rates], rtol=1e-6)
        different = [key for key in record if ours[key] != record[key] and key not in rates]
        if not same_processor:
            first = [key for key in record if key.startswith("/metrics/0/train/loss")]
            np.testing.assert_allclose([ours[key] for key in first], [record[key] for key in first], rtol=1e-4)
            different = [key for key in different if key.startswith("/groups")]
        assert not different, f"{name}: {[(key, ours[key], record[key]) for key in different[:5]]}"
