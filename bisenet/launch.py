"""What surrounds a run: one process in its directory, or one for each device of this machine, and how they end.

Lightning's own relaunch would repeat a whole sweep in every child, and torch's elastic launcher names the process that
was noticed first and not the one that was killed. Here only the function is started, in processes that find each other
as those of torchrun do; the first failure ends all of them, and so does the end of this process.
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
"""Keys that may differ when a run is continued: they cannot change its result."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send to a job that is to end; SIGUSR1 is Slurm's warning."""
ENDED = 128 + signal.SIGTERM
"""Exit code of a run that was told to end."""
_PATIENCE = 10  # seconds that processes have to end by themselves when one of them has failed


# ---------------------------------------------------------------- a run's directory


class InUse(OSError):
    """Another process works in a directory."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a directory as its only process.

    Raises:
        InUse: another process does; the message names it and its host.
    """
    file = folder.resolve() / ".lock"
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        owner = file.read_text().strip().replace("\n", " on ")  # of a soft lock, number and host are two lines
        raise InUse(f"{folder} is in use by process {owner}") from None
    try:
        if not isinstance(lock, SoftFileLock):  # which filelock turns it into where a file system knows no locks
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: filelock takes no lock on a file without a name
        lock.release()


def read_results(folder: Path) -> dict[str, Any] | None:
    """What ``results.json`` of a run holds; None: there is none, or it is damaged, or of another version."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"split", "protocols"} <= found.keys() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str]) -> str:
    """What two configurations of one run say differently, a line for each key; empty: nothing.

    Args:
        before: plain values; what the run was begun with.
        now: plain values; what it is to be continued with.
        ignored: keys that may differ, with all below them.
    """
    there, here = dict(_leaves(before)), dict(_leaves(now))
    there.setdefault("channels_last", here.get("channels_last"))  # of a run from before 0.3.0, which stays contiguous
    keys = [
        key for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and str(there.get(key)) != str(here.get(key))  # nan is not itself
        and not within(key, ignored)
    ]  # fmt: skip
    lines = [f"  {key}: {there.get(key, 'nothing')} there, {here.get(key, 'nothing')} now" for key in keys]
    return "\n".join([*lines, LONGER] if {"trainer.max_steps", "scheduler.total_steps"} & {*keys} else lines)


LONGER = (
    "The learning rate has run out at trainer.max_steps: a longer training is a new run, from the start, or with "
    "finetune_from=<run> from the weights of this one."
)
"""What to do for a longer training."""


def within(key: str, nodes: Collection[str]) -> bool:
    """Whether a key is one of some nodes, or below one."""
    return any(f"{key}.".startswith(f"{node}.") for node in nodes)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Full key and value of everything in a plain container that holds nothing further."""
    if not isinstance(node, Mapping):
        yield path, node
    else:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))


# ---------------------------------------------------------------- processes


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


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes that share a piece of work, and end with this one."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(processes, context, initializer=end_with, initargs=(os.getpid(),))


def end_with(parent: int) -> None:
    """End this process when its parent ends, however that ends: else it would train on, beside a resumption."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def run(function: str, argument: Any, processes: int, job_logging: Mapping[str, Any]) -> None:
    """Call a function in several processes.

    A signal of ``ENDING_SIGNALS`` is passed on to them; a second one, a second or more later, ends them at once.

    Args:
        function: as ``module:name``, imported in the processes only.
        argument: plain data.
        processes: how many.
        job_logging: for ``logging.config.dictConfig`` in the first process, which speaks for all.

    Raises:
        ChildProcessError: a process failed, or was killed; the message names it, and its error.
        SystemExit: with the code ``ENDED`` after such a signal.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the processes find each other
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
                process.kill() if told else os.kill(process.pid or 0, number)
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
    """The process that failed first, and why: one that was killed, since its peers' errors only follow from that."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            hint = ", as Linux does for want of memory" if -code == signal.SIGKILL else ""
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
