"""A run that is killed at any of its file operations, twice, ends as an undisturbed run does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_survives_a_kill_at_any_file_operation(tmp_path: Path) -> None:
    if (compiler := shutil.which("cc")) is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler for the library that kills")
    library = tmp_path / "crash.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "crash.c", "-ldl"], check=True)
    (tmp_path / "temporary").mkdir()
    environment = {"LD_PRELOAD": str(library), "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}  # fmt: skip
    command = [sys.executable, str(HERE / "crash.py"), str(tmp_path / "runs")]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
