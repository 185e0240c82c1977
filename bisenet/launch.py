"""Start a training in as many processes as its strategy asks for. Light: torch is imported in those processes only.

The job itself starts torchrun, with its configuration in a file, so that it is the same on one device and on several,
alone and as a job of a sweep, on CPUs (gloo) and on GPUs (NCCL). Lightning's own relaunch would repeat the whole sweep
in every child. Where torchrun has been started by the user, on several nodes, each process trains as it is.
"""

import ctypes
import json
import logging.config
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bisenet import config

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train as :func:`bisenet.experiment.train` does, here or in one process for each device of this node.

    Raises:
        ChildProcessError: a process failed; the message is that of its error.
        ValueError: as ``experiment.train``, or a run that is to be resumed elsewhere.
    """
    if cfg.resume is not None and Path(cfg.resume).resolve() != run_dir.resolve():
        raise ValueError(f"hydra.run.dir: got {run_dir}, accepted: {cfg.resume}, where the run that is resumed lies")
    if cfg.strategy.name == "single" or "LOCAL_RANK" in os.environ:
        from bisenet import experiment  # heavy: only once the configuration is sound

        return experiment.train(cfg, run_dir)
    if cfg.trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes: got {cfg.trainer.num_nodes}, accepted: 1, unless torchrun starts scripts/train.py on "
            "every node: torchrun --nnodes ... --nproc-per-node ... scripts/train.py ... (see the README)"
        )
    job = {"config": config.plain(cfg), "logging": config.job_logging(), "command": sys.argv, "run_dir": str(run_dir)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job))
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.trainer.devices))}
        if code := _run([sys.executable, "-m", "bisenet.launch", str(file)], threads | os.environ):
            raise ChildProcessError(f"strategy=ddp: {_first_error(Path(folder), code)}")
    return json.loads((run_dir / "results.json").read_text())


def _first_error(folder: Path, code: int) -> str:
    """What the process that failed first has left; the others fail for want of it. Goes to the log of the job."""
    errors = [json.loads(file.read_text()) for file in folder.glob("error_*.json")]
    if not errors:
        return f"a process ended with code {code} and without an error, as one that is killed for want of memory"
    first = min(errors, key=lambda error: error["time"])
    if first["traceback"]:
        log.error("process %d failed:\n%s", first["rank"], first["traceback"])
    return f"process {first['rank']}: {first['message']}"


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that ends with this process however that ends: else it would train on, and beside a resumption."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:  # a launcher such as submitit has its own
        signal.signal(signal.SIGTERM, stop)
    child = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
    try:
        return child.wait()
    finally:
        child.terminate()  # ends its processes; nothing happens where it has ended
        child.wait()
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent() -> None:
    """In the child: have Linux end it when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _torchrun(file: Path) -> None:
    """The parent of the processes; their job makes the report of a failure, which torchrun would bury."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    devices = json.loads(file.read_text())["config"]["trainer"]["devices"]
    try:
        main(["--standalone", "--nproc-per-node", str(devices), "-m", "bisenet.launch", str(file)])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None


def _worker(file: Path) -> None:
    """One of the processes that torchrun starts."""
    job = json.loads(file.read_text())
    sys.argv = job["command"]  # what the run was started with, for its provenance
    rank = int(os.environ["RANK"])
    if rank == 0:
        logging.config.dictConfig(job["logging"])
    from bisenet import experiment

    try:
        experiment.train(config.restore(job["config"]), Path(job["run_dir"]))
    except Exception as error:
        told = {"time": time.time(), "rank": rank, "message": f"{type(error).__name__}: {error}"}
        told["traceback"] = "" if isinstance(error, config.TELLING) else traceback.format_exc()
        file.with_name(f"error_{rank}.json").write_text(json.dumps(told))
        raise SystemExit(1) from None


if __name__ == "__main__":
    (_worker if "LOCAL_RANK" in os.environ else _torchrun)(Path(sys.argv[1]))
