"""Kill small runs at file operations, continue them, and compare: ``python tests/crash.py FOLDER``.

The library made of ``crash.c`` is preloaded. There is a run for each operation. It is killed there, its continuation
is killed somewhere else, and what continues that one must end as an undisturbed run does. Every run is a fork of this
process, which has imported everything.
"""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import draw_nothing
from test_callbacks import PLAIN, composed_small
from test_experiment import results, rows, same

from bisenet import checkpoint, experiment

draw_nothing()


def train(folder: Path) -> None:
    resume = [f"resume={folder}"] if folder.exists() else []
    experiment.train(composed_small(*PLAIN, f"data.root={folder.parent / 'shapes'}", "callbacks=[default,ema]",
                     "trainer.max_steps=4", "trainer.val_check_interval=2", "callbacks.last.every_n_steps=1",
                     f"run_dir={folder}", *resume))  # fmt: skip


def forked(function: Callable[[], None], folder: Path, at: int = 0) -> int:
    """Exit code of a function that is killed at an operation; 0: never. The library reads the environment each time."""
    if (child := os.fork()) == 0:
        os.environ |= {"CRASH_IN": str(folder), "CRASH_AT": str(at)}
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(run: Path) -> list[object]:
    """All that a run computed."""
    files = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best", "ema")]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return [rows(run), results(run), *[[file.get(key) for key in keys] for file in files]]


def main(folder: Path) -> None:
    counted = folder / "operations"

    def count() -> None:
        train(folder / "calm")
        counted.write_text(str(ctypes.CDLL(None).crash_operations()))

    assert forked(count, folder / "calm") == 0
    calm, operations = outcome(folder / "calm"), int(counted.read_text())
    assert operations > 20
    for point in range(1, operations + 1):
        run = folder / f"{point:03}"
        assert forked(lambda: train(run), run, point) == -signal.SIGKILL  # noqa: B023
        again = forked(lambda: train(run), run, 1 + 7 * point % operations)  # noqa: B023
        assert again == -signal.SIGKILL or (run / "results.json").exists()
        assert forked(lambda: train(run), run) == 0, point  # noqa: B023
        assert same(outcome(run), calm), point
        assert checkpoint.newest(run) == run / "checkpoints" / "last.ckpt"
        left = [*run.rglob(".*.draft"), *Path(tempfile.gettempdir()).rglob("*")]
        assert not [path for path in left if path.is_file()], point


if __name__ == "__main__":
    main(Path(sys.argv[1]))
