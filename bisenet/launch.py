"""Start a training in as many processes as its strategy asks for. Light: torch is imported in those processes only.

The job itself starts torchrun, with its configuration in a file, so that it is the same on one device and on several,
alone and as a job of a sweep, on CPUs (gloo) and on GPUs (NCCL). Lightning's own relaunch would repeat the whole sweep
in every child. Where torchrun has been started by the user, on several nodes, each process trains as it is.
"""

import json
import logging.config
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bisenet import config


def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train as :func:`bisenet.experiment.train` does, here or in one process for each device of this node.

    Raises:
        RuntimeError: a process failed; its own error has been printed before.
        ValueError: as ``experiment.train``.
    """
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
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        processes = ["--nproc-per-node", str(cfg.trainer.devices), "-m", "bisenet.launch", str(file)]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.trainer.devices))}
        done = subprocess.run([*torchrun, *processes], env=threads | os.environ, check=False)
    if done.returncode:
        raise RuntimeError(f"strategy=ddp: a process ended with code {done.returncode}; its error stands above")
    return json.loads((run_dir / "results.json").read_text())


def _worker(file: Path) -> None:
    """One of the processes that torchrun starts."""
    job = json.loads(file.read_text())
    sys.argv = job["command"]  # what the run was started with, for its provenance
    if int(os.environ["RANK"]) == 0:
        logging.config.dictConfig(job["logging"])
    from bisenet import experiment

    experiment.train(config.restore(job["config"]), Path(job["run_dir"]))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
