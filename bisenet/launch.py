"""The processes of a run: a lock on its directory, one process for each device of this machine, and how they end.

:func:`run` starts one function in several processes, with the environment variables of torchrun. The first failure ends
all of them, and so does the end of this process. Lightning's own relaunch would repeat a whole sweep in every child;
torch's elastic launcher blames the first process that it notices, not the one that was killed.
"""

import ctypes
import importlib
import json
import logging.config
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

PRACTICAL = (
    "data.root", "data.workers", "data.cache", "data.cache_root", "trainer.accelerator",
    "callbacks.progress", "logger", "hydra", "run_dir", "trust", "max_pixels_per_batch",
)  # fmt: skip
"""Keys of the configuration that may differ when a run is continued, since they cannot change its result."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which batch systems tell a job to end; SIGUSR1 is Slurm's warning."""
ENDED = 128 + signal.SIGTERM
"""Exit code of a run that was told to end."""
LONGER = (
    "The learning rate has run out at trainer.max_steps: a longer training is a new run, from the start, or with "
    "finetune_from=<run> from the weights of this one."
)
"""Advice where a run cannot be continued with more steps."""
_PATIENCE = 10  # seconds that the other processes have to end by themselves once one has failed


# ---------------------------------------------------------------- a run's directory


class InUse(OSError):
    """Another process has locked a directory."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a directory, so that no other process works there.

    Raises:
        InUse: another process has locked it; the message names that process and its host.
    """
    file = folder.resolve() / ".lock"
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        owner = file.read_text().strip().replace("\n", " on ")  # process number and host are two lines
        raise InUse(f"{folder} is in use by process {owner}") from None
    try:
        if not isinstance(lock, SoftFileLock):  # a soft lock has written its owner itself
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: filelock takes no lock on a file without a name
        lock.release()


def read_results(folder: Path) -> dict[str, Any] | None:
    """The content of a run's ``results.json``; None if the file is missing, damaged or of another version."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"split", "protocols"} <= found.keys() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str]) -> str:
    """Differences between two configurations of one run, one line for each key; empty if there are none.

    Args:
        before: the configuration that the run was begun with, in plain values.
        now: the configuration that it is to be continued with, in plain values.
        ignored: keys that may differ, with all keys below them.
    """
    there, here = dict(leaves(before)), dict(leaves(now))
    there.setdefault("channels_last", here.get("channels_last"))  # runs before 0.3.0 lack the key
    keys = [
        key for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and str(there.get(key)) != str(here.get(key))  # nan != nan
        and not within(key, ignored)
    ]  # fmt: skip
    lines = [f"  {key}: {there.get(key, 'nothing')} there, {here.get(key, 'nothing')} now" for key in keys]
    return "\n".join([*lines, LONGER] if {"trainer.max_steps", "scheduler.total_steps"} & {*keys} else lines)


def within(key: str, nodes: Collection[str]) -> bool:
    """Whether a dotted key is one of the nodes, or below one."""
    return any(f"{key}.".startswith(f"{node}.") for node in nodes)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every value that is no mapping."""
    if not isinstance(node, Mapping):
        yield path, node
    else:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))


# ---------------------------------------------------------------- processes


def processes_here(devices: Any, accelerator: str) -> int:
    """How many processes Lightning's ``Trainer`` needs on this machine; 1 if torchrun has started this one.

    Args:
        devices: a number, a list of device numbers (also as text, ``0,1``), or ``auto``: one for each GPU, at least 1.
        accelerator: ``auto``, ``cpu``, ``gpu``, ...; on a CPU, ``auto`` devices are one.
    """
    if "LOCAL_RANK" in os.environ:
        return 1
    if isinstance(devices, str) and "," in devices:
        devices = [number for number in devices.split(",") if number.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdecimal():
        return int(devices)
    if accelerator == "cpu":
        return 1
    import torch  # takes seconds: only where it is needed

    return max(1, torch.cuda.device_count())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def pool(processes: int) -> ProcessPoolExecutor:
    """A pool of worker processes that end when this process ends."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(processes, context, initializer=end_with, initargs=(os.getpid(),))


def end_with(parent: int) -> None:
    """End this process when its parent ends, even by SIGKILL; else it would train on beside the resumed run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)


def run(function: str, argument: Any, processes: int, job_logging: Mapping[str, Any]) -> None:
    """Call a function in several processes, and wait for all of them.

    A signal of ``ENDING_SIGNALS`` is passed on to the processes; another one, a second or more later, kills them.

    Args:
        function: as ``module:name``; only the new processes import it.
        argument: the function's argument, plain data.
        processes: how many.
        job_logging: configuration for ``logging.config.dictConfig`` in the first process, which logs for all.

    Raises:
        ChildProcessError: a process failed or was killed; the message names it and its error.
        SystemExit: with the code ``ENDED``, after one of the signals.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the rendezvous
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    torchrun = {
        "MASTER_ADDR": store.host, "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": os.getpid(), "TORCHELASTIC_RESTART_COUNT": 0, "GROUP_RANK": 0,
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    ranks, pipes = [], []
    told: list[float] = []

    def tell(number: int, _: Any) -> None:
        if told and time.monotonic() < told[0] + 1:
            return  # `timeout` sends its signal twice
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL if told else number)
        told.append(time.monotonic())

    before = [(number, signal.signal(number, tell)) for number in ENDING_SIGNALS]
    try:
        for rank in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            environment = {name: str(value) for name, value in (torchrun | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            arguments = (sender, os.getpid(), environment, function, argument, dict(job_logging))
            ranks.append(context.Process(target=_call, args=arguments))
            pipes.append(receiver)
            ranks[-1].start()
        working = {process.sentinel: process for process in ranks}
        while working and not any(process.exitcode for process in ranks):
            for sentinel in connection.wait(working):
                working.pop(sentinel).join()
        patient_until = time.monotonic() + _PATIENCE
        for process in ranks:
            process.join(max(0, patient_until - time.monotonic()))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
        for number, handler in before:
            signal.signal(number, handler)
    if ENDED in codes or (told and 1 not in codes):
        raise SystemExit(ENDED)
    if any(codes):
        raise ChildProcessError(_failure(codes, pipes))


def _failure(codes: Sequence[int | None], pipes: Sequence[Any]) -> str:
    """Which process failed first, and why. A killed process comes first: the errors of the others follow from that."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            hint = ", as Linux does when memory runs out" if -code == signal.SIGKILL else ""
            return f"process {rank} of {len(codes)} was killed by {signal.Signals(-code).name}{hint}"
    reports = [(*pipe.recv(), rank) for rank, pipe in enumerate(pipes) if pipe.poll()]
    if not reports:
        return f"processes ended with the codes {codes} and without an error"
    _, message, trace, rank = min(reports)
    if not message.startswith(("ValueError", "FileNotFoundError", "FloatingPointError", "RuntimeError: DataLoader")):
        log.error("process %d failed:\n%s", rank, trace)
    return f"process {rank} of {len(codes)}: {message}"


def _call(
    sender: Any, parent: int, environment: dict[str, str], function: str, argument: Any, job_logging: Any
) -> None:
    """Call the function in a new process; an error goes through ``sender`` as its time, its text and its traceback."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends them
    os.environ.update(environment)
    if environment["RANK"] == "0":
        logging.config.dictConfig(job_logging)
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(argument)
    except Exception as error:
        sender.send((time.time(), f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None
