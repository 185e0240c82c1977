"""Run a function in one process for each device of this machine, by torch's elastic launcher.

Lightning's own relaunch would repeat a whole sweep in every child. The elastic launcher starts only the function,
passes on the error of the process that failed first, and ends the others.
"""

import ctypes
import importlib
import logging.config
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)


def processes_here(devices: Any) -> int:
    """How many processes Lightning's ``Trainer(devices=...)`` needs on this machine; 1 where torchrun has started us.

    Args:
        devices: a number, a list of device numbers, or ``auto``: as many as there are GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        return 1
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdecimal():
        return int(devices)
    import torch  # heavy: only where it must be asked

    return max(1, torch.cuda.device_count())


def run(function: str, argument: Any, processes: int, job_logging: Mapping[str, Any]) -> Any:
    """Call a function in several processes, and return what the first one returned.

    Args:
        function: as ``module:name``, imported in the processes only.
        argument: plain data.
        processes: how many.
        job_logging: for ``logging.config.dictConfig`` in the first process, which speaks for all.

    Raises:
        ChildProcessError: a process failed; the message is that of its error.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.multiprocessing.errors"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it would print the traceback that follows
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="spawn", max_restarts=0, run_id=str(os.getpid()),
    )  # fmt: skip
    try:
        return elastic_launch(config, _call)(function, argument, dict(job_logging), sys.argv)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        content: Any = failure.error_file_data.get("message", {})
        if not isinstance(content, dict):
            reason = (
                f"ended with code {failure.exitcode} and without an error, as one that is killed for want of memory"
            )
            raise ChildProcessError(f"process {rank} of {processes} {reason}") from None
        message = content["message"]
        if not message.startswith(("ValueError", "FileNotFoundError", "FloatingPointError")):
            log.error("process %d failed:\n%s", rank, content["extraInfo"]["py_callstack"])
        raise ChildProcessError(f"process {rank} of {processes}: {message}") from None


def _call(function: str, argument: Any, job_logging: dict[str, Any], argv: list[str]) -> Any:
    if sys.platform == "linux":  # end with the parent, however that ends: else it would train on, beside a resumption
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
    sys.argv = argv  # what the run was started with, for its provenance
    if os.environ["RANK"] == "0":
        logging.config.dictConfig(job_logging)
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(argument)
